# %% [markdown]
# # 1 · The tape
#
# A detector has a million parameters and one number to make small, the loss.  Training asks thousands of
# times: **how does the loss change with every single parameter, at the price of a few evaluations?**
#
# **You will see** that it is enough if each operation remembers how to send a gradient one step back, that
# `Tensor` is this memory and nothing more, and how to check a gradient: a slightly wrong one still trains,
# only worse.
#
# | | |
# |---|---|
# | Needs | NumPy, the chain rule |
# | Reads | `minidet/autograd.py`, `minidet/ops/activation.py`, `tests/gradients.py` |
# | Source | Baydin et al., *Automatic Differentiation in Machine Learning*, arXiv:1502.05767, section 3.2 |
# | Time | about 3 s on a laptop CPU |

# %%
import os
import tracemalloc
from pathlib import Path

import numpy as np

from minidet import Tensor, no_grad
from minidet.autograd import record
from minidet.ops import exp, softmax, sum
from minidet.plots import lines

rng = np.random.default_rng(1)
out = Path(os.environ.get("MINIDET_CHAPTER_OUT", "runs/chapters")) / "01"
out.mkdir(parents=True, exist_ok=True)

# %% [markdown]
# ## One derivative, by hand
#
# Let $L = (ab + a)^2$ at $a = 3$, $b = 4$.  In steps: $p = ab = 12$, then $s = p + a = 15$, then $L = s^2 = 225$.
# The chain rule walks these steps backwards:
#
# $$\frac{\partial L}{\partial s} = 2s = 30, \qquad \frac{\partial L}{\partial p} = 30, \qquad
#   \frac{\partial L}{\partial b} = 30\,a = 90.$$
#
# $a$ was used **twice**, in the product and in the sum.  Both send it a message, and messages add up:
# $\partial L / \partial a = 30\,b + 30 = 150$.  Nudging each input a little, up and down, agrees:

# %%
def L(a, b):
    return (a * b + a) ** 2


h = 1e-6
nudged = np.array([L(3 + h, 4) - L(3 - h, 4), L(3, 4 + h) - L(3, 4 - h)]) / (2 * h)
print(f"dL/da and dL/db   by nudging   {nudged[0]:.6f} and {nudged[1]:.6f}")
assert np.allclose(nudged, [150, 90], rtol=1e-8)

# %% [markdown]
# ## From formulas to closures
#
# Nudging costs two evaluations *per parameter*; walking backwards gives all derivatives in one walk.  To make
# it automatic, let every operation write a function on a tape: one that turns the gradient of its output into
# those of its inputs.  It is a closure: it keeps the numbers that it will need.

# %%
values, tape = [], []                   # a number is known by its place in `values`


def leaf(value):
    values.append(value)
    return len(values) - 1


def write(value, inputs, backward):
    tape.append((leaf(value), inputs, backward))
    return len(values) - 1


def multiply(i, j):
    a, b = values[i], values[j]
    return write(a * b, (i, j), lambda g: (g * b, g * a))


def plus(i, j):
    return write(values[i] + values[j], (i, j), lambda g: (g, g))


def gradients_of(output):
    gradients = np.zeros(len(values))
    gradients[output] = 1               # dL/dL
    for made, inputs, backward in reversed(tape):
        # All that used `made` stands later on the tape: its gradient is complete by now.
        for source, g in zip(inputs, backward(gradients[made]), strict=True):
            gradients[source] += g      # not `=`: it may have been used before
    return gradients


i, j = leaf(3.0), leaf(4.0)
s = plus(multiply(i, j), i)
toy = gradients_of(multiply(s, s))      # s, too, is used twice
print(f"                  by the toy   {toy[i]:.0f} and {toy[j]:.0f}")
assert (toy[i], toy[j]) == (150, 90)

# %% [markdown]
# ## The library
#
# `Tensor` does this with arrays.  There is no list on the side: a tensor knows the `Node` that made it, a node
# knows its inputs, and `backward` sorts what it finds so that each tensor comes after all its users.  Only
# what depends on a tensor with `requires_grad` is remembered.

# %%
def drawn(tensor, indent="  "):
    """The graph behind a tensor, what was made last on top."""
    inputs = tensor.node.inputs if tensor.node else ()
    name = tensor.node.op if tensor.node else "leaf"
    return f"{indent}{name} = {float(tensor):g}\n" + "".join(drawn(x, indent + "   ") for x in inputs)


a, b = (Tensor(np.array(x), requires_grad=True) for x in (3.0, 4.0))
loss = (a * b + a) ** 2
picture = drawn(loss)                   # before `backward`, which takes the graph apart
loss.backward()
print(f"                  by minidet   {float(a.grad):.0f} and {float(b.grad):.0f}\n\n{picture}", end="")
assert (float(a.grad), float(b.grad)) == (toy[i], toy[j])

# %% [markdown]
# ## Why the tape is consumed
#
# Closures keep arrays, and those of a network are far larger than its parameters.  So `backward` lets go of
# each step once it was used, and walking the same tape twice is an error.  The gradients of leaves stay and
# *add up* over several losses: that is how a large batch is computed in parts.

# %%
def chain(x):
    for _ in range(20):
        x = exp(-x)                     # two results of 1 MiB
    return sum(x)


def held():
    return tracemalloc.get_traced_memory()[0] / 2**20


x = Tensor(np.full(2**17, 0.5), requires_grad=True)
tracemalloc.start()
with no_grad():
    y = chain(x)
forgotten = held()
y = chain(x)
remembered = held()
y.backward()
consumed = held()
tracemalloc.stop()
print(f"\n20 steps hold {forgotten:.1f} MiB under no_grad, {remembered:.1f} before backward, {consumed:.1f} after")
assert forgotten < 0.1 and remembered > 39 and consumed < 1.1           # what is left is x.grad

try:
    y.backward()
except RuntimeError as error:
    print(f"backward again: {error}")
    assert "already run backwards" in str(error)

first = x.grad
chain(x).backward()                     # a new forward pass writes a new tape
assert np.array_equal(x.grad, 2 * first)

# %% [markdown]
# ## Checking a gradient: how small a nudge?
#
# A central difference with step $h$ errs by about $h^2$, because functions are curved, and by about
# $\varepsilon / h$, because numbers have 16 digits.  Together these are least near $h = \varepsilon^{1/3}$.

# %%
steps = np.logspace(-13, -1, 97)
central = np.abs((np.exp(1 + steps) - np.exp(1 - steps)) / (2 * steps) / np.e - 1)
one_sided = np.abs((np.exp(1 + steps) - np.e) / steps / np.e - 1)
STEP = float(np.finfo(np.float64).eps ** (1 / 3))                       # 6e-6
near = (0.3 * STEP < steps) & (steps < 3 * STEP)
assert central[near].max() < 1e-9 < one_sided.min()

curves = {"one-sided": (steps, one_sided), "central": (steps, np.maximum(central, 1e-13))}
lines(curves, out / "step.png", x="step h", y="relative error", title="d(exp x)/dx by differences", log="xy")
print(f"\na good step is about {STEP:.0e}: look at {out / 'step.png'}")

# %% [markdown]
# ## Checking a gradient: of what?
#
# A function with many outputs must first be made one number.  The obvious one is their sum, and it is a trap.
# Softmax gives numbers that add up to 1, whatever $x$ is: the gradient of the sum *is* 0, so a backward pass
# that always returns 0 passes.  Weigh the outputs **randomly** instead, $\langle v, f(x) \rangle$.

# %%
def error(f, array, v):
    """How far d<v, f(x)>/dx by the tape is from central differences, at most."""
    x = Tensor(array, requires_grad=True)
    f(x).backward(v)
    nudges = STEP * np.eye(array.size).reshape(-1, *array.shape)        # one element each
    rises = [f(Tensor(array + n)).data - f(Tensor(array - n)).data for n in nudges]
    return max(abs(g - np.vdot(v, rise) / (2 * STEP)) for g, rise in zip(x.grad.ravel(), rises, strict=True))


def broken(x):
    return record("broken", softmax(x).data, (x,), lambda gy: (0 * gy,))


array, ones, v = rng.normal(size=(3, 4)), np.ones((3, 4)), rng.normal(size=(3, 4))
print(f"\n{'gradient off by':18}{'sum':>8}{'random v':>12}")
for f in (softmax, broken):
    print(f"{f.__name__:18}{error(f, array, ones):8.0e}{error(f, array, v):12.0e}")
assert max(error(softmax, array, ones), error(softmax, array, v)) < 1e-9
assert error(broken, array, ones) < 1e-9 and error(broken, array, v) > 0.01     # the sum is blind

# %% [markdown]
# `tests/gradients.py` holds every op of the library to this.
#
# ## Three things to remember
#
# 1. The backward pass is the forward pass in reverse, a closure for each operation; a tensor that was used
#    several times adds up what it receives.
# 2. The tape is the memory bill of training, and `backward` pays it off as it goes.
# 3. Check gradients in float64, against central differences, **in a random direction**.
#
# **Next**: chapter 2 runs a convolution backwards.
