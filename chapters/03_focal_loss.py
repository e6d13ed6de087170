# %% [markdown]
# # 3 · The focal loss
#
# RetinaNet asks its question at every one of about a hundred thousand anchors of an image, and the answer is
# "nothing here" at all but a few.  **How can a loss hear those few, when everything else is background?**
#
# **You will see** that cross-entropy listens to the crowd, that one more factor, $(1 - p_t)^\gamma$, quiets
# whoever is right already, why this factor must not be computed as it is written, and that the loss of a
# network nobody has trained yet can be worked out with pencil and paper.
#
# | | |
# |---|---|
# | Needs | chapter 1 (the tape) |
# | Reads | `minidet/ops/losses.py`, `minidet/kernels/focal.py`, `minidet/models/heads.py` |
# | Source | Lin et al., *Focal Loss for Dense Object Detection*, arXiv:1708.02002, section 3, appendices A and B |
# | Time | about 5 s on a laptop CPU, 15 s the first time for compiling |

# %%
import os
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

import minidet as md
from minidet import Tensor
from minidet.detection import BACKGROUND, build_targets, image_weights, loss
from minidet.ops import bce_with_logits, focal_star, log, sigmoid, sigmoid_focal_loss
from minidet.plots import lines

rng = np.random.default_rng(3)
out = Path(os.environ.get("MINIDET_CHAPTER_OUT", "runs/chapters")) / "03"
out.mkdir(parents=True, exist_ok=True)

# %% [markdown]
# ## Ten objects and a crowd, by hand
#
# A network says "object" with probability $p$.  Cross-entropy charges $-\log p$ where there is one and
# $-\log(1 - p)$ where there is none; with $p_t$ for the probability of what is *true*, both are $-\log p_t$
# (eq. 1 and 2).  Say 100,000 anchors are background and the network knows, $p_t = 0.99$; ten are objects
# and it does not, $p_t = 0.1$.  Who makes the loss?

# %%
def CE(pt):
    return -np.log(pt)


def FL(pt, gamma):
    return (1 - pt) ** gamma * CE(pt)                           # eq. 4


print(f"{'':15}{'100,000 easy':>14}{'10 hard':>10}")
for name, gamma in [("cross-entropy", 0), ("focal, gamma 2", 2)]:
    print(f"{name:15}{1e5 * FL(0.99, gamma):14.1f}{10 * FL(0.1, gamma):10.1f}")
assert np.isclose(1e5 * CE(0.99), 1005, rtol=1e-3) and np.isclose(10 * CE(0.1), 23.03, rtol=1e-3)
assert np.isclose(1e5 * FL(0.99, 2), 0.1005, rtol=1e-3) and np.isclose(10 * FL(0.1, 2), 18.65, rtol=1e-3)

# %% [markdown]
# The crowd's share falls from 98 % to half a percent.
#
# ## The idea (section 3)
#
# $$\text{CE} = -\log p_t \;\;(1, 2) \qquad -\alpha_t \log p_t \;\;(3) \qquad
#   \text{FL} = -(1 - p_t)^\gamma \log p_t \;\;(4) \qquad -\alpha_t (1 - p_t)^\gamma \log p_t \;\;(5)$$
#
# $\alpha_t$, which is $\alpha$ for objects and $1 - \alpha$ for background, weighs the two *classes*; the
# factor $(1 - p_t)^\gamma$ weighs *easy against hard*, and nobody has to say which is which.

# %%
pt = np.linspace(np.exp(-5), 1, 400)
figure_1 = {f"γ = {gamma}" + " (CE)" * (gamma == 0): (pt, FL(pt, gamma)) for gamma in (0, 0.5, 1, 2, 5)}
lines(figure_1, out / "figure_1.png", x="$p_t$, the probability of what is true", y="loss", title="The focal loss")

assert np.array_equal(FL(pt, 0), CE(pt))                        # gamma 0 is cross-entropy
ratio = {p: CE(p) / FL(p, 2) for p in (0.5, 0.9, 0.968)}        # what section 3.2 says of gamma 2:
print("\nat p_t of      " + "".join(f"{p:>8}" for p in ratio))
print("FL is lower by " + "".join(f"{r:7.0f}x" for r in ratio.values()))
assert np.isclose(ratio[0.9], 100) and np.isclose(ratio[0.968], 1000, rtol=0.03)
assert np.max(CE(pt[pt <= 0.5]) / FL(pt[pt <= 0.5], 2)) <= ratio[0.5] == 4

# %% [markdown]
# ## Logits, a cousin, and derivatives (appendices A and B)
#
# A network gives logits $x$, with $p = \sigma(x)$.  With $y = 1$ for objects and $-1$ for background, $x_t = yx$
# (6) says how right it is: $p_t = \sigma(x_t)$.  The paper's second loss stretches and shifts the logit first:
#
# $$p_t^* = \sigma(\gamma x_t + \beta) \;\;(7) \qquad \text{FL}^* = -\log(p_t^*) / \gamma \;\;(8)$$
#
# $$\frac{d\text{CE}}{dx} = y(p_t - 1) \;\;(9) \qquad
#   \frac{d\text{FL}}{dx} = y(1 - p_t)^\gamma(\gamma p_t \log p_t + p_t - 1) \;\;(10) \qquad
#   \frac{d\text{FL}^*}{dx} = y(p_t^* - 1) \;\;(11)$$
#
# Each as an op of the library, as a formula of $x_t$, and as the formula's derivative:

# %%
def sigma(x):
    return 1 / (1 + np.exp(-x))


def eq_10(xt, gamma=2):
    pt = sigma(xt)
    return (1 - pt) ** gamma * (gamma * pt * np.log(pt) + pt - 1)


losses = {
    "CE": (bce_with_logits, lambda xt: CE(sigma(xt)), lambda xt: sigma(xt) - 1),
    "FL γ = 2": (partial(sigmoid_focal_loss, alpha=None, gamma=2), lambda xt: FL(sigma(xt), 2), eq_10),
    "FL* γ = 2, β = 1": (
        partial(focal_star, gamma=2, beta=1), lambda xt: CE(sigma(2 * xt + 1)) / 2, lambda xt: sigma(2 * xt + 1) - 1
    ),
    "FL* γ = 4, β = 0": (
        partial(focal_star, gamma=4, beta=0), lambda xt: CE(sigma(4 * xt)) / 4, lambda xt: sigma(4 * xt) - 1
    ),
}  # fmt: skip


def slope(op, x, *targets):
    tensor = Tensor(x, requires_grad=True)
    op(tensor, *targets).backward(np.ones_like(x))
    return tensor.grad


x, targets = 4 * rng.normal(size=500), rng.integers(0, 2, 500)
y = 2 * targets - 1
for op, formula, derivative in losses.values():
    assert np.allclose(op(Tensor(x), targets).data, formula(y * x), rtol=1e-12)
    assert np.allclose(slope(op, x, targets), y * derivative(y * x), rtol=1e-9, atol=1e-14)
weighted = sigmoid_focal_loss(Tensor(x), targets, alpha=0.25, gamma=2).data         # eq. 5, as RetinaNet is trained
assert np.allclose(weighted, np.where(targets, 0.25, 0.75) * FL(sigma(y * x), 2), rtol=1e-12)

xt = np.linspace(-10, 10, 801)
middle, ones = np.abs(xt) <= 5, np.ones_like(xt)
figure_5 = {name: (xt[middle], op(Tensor(xt), ones).data[middle]) for name, (op, _, _) in losses.items()}
figure_6 = {name: (xt, slope(op, xt, ones)) for name, (op, _, _) in losses.items()}
lines(figure_5, out / "figure_5.png", x="$x_t$", y="loss", title="Four losses")
lines(figure_6, out / "figure_6.png", x="$x_t$", y="derivative", title="Their derivatives")
for name, (_, g) in figure_6.items():       # -1 where surely wrong, 0 where surely right, and all but CE's ...
    assert np.isclose(g[0], -1, atol=1e-3) and np.isclose(g[-1], 0, atol=1e-3)
    assert abs(g[xt > 2]).max() < 0.02 or name == "CE"                              # ... small as soon as right

# %% [markdown]
# Equation 10 again, by the other ways of chapter 1: central differences, and the tape through elementary ops.

# %%
def stepwise(x, y, gamma):
    pt = sigmoid(x * y)
    return -((1 - pt) ** gamma) * log(pt)


h, formula = 6e-6, losses["FL γ = 2"][1]
ways = {
    "by the library": slope(losses["FL γ = 2"][0], x, targets),
    "by differences": (formula(y * (x + h)) - formula(y * (x - h))) / (2 * h),
    "by the tape": slope(stepwise, x, y, 2),
}
print("\noff from eq. 10:" + "".join(f"{np.abs(g - y * eq_10(y * x)).max():9.0e} {name}" for name, g in ways.items()))
assert all(np.allclose(g, y * eq_10(y * x), rtol=1e-6, atol=1e-9) for g in ways.values())

# %% [markdown]
# ## Why it is fused
#
# Step by step in float32, the formula meets numbers that were rounded to 0 or 1: $\log 0$, and for $\gamma < 1$
# the infinite slope of $(1 - p_t)^\gamma$ at $p_t = 1$.  Backwards, infinity times zero is NaN, and one NaN ends
# a training.  The library needs only $\log p_t$ and $\log(1 - p_t)$, straight from the logit, and never overflows.

# %%
xt = np.array([-120, -20, 0, 20, 120], np.float32)
ones = np.ones_like(xt)
print(f"\n{'x_t':26}" + "".join(f"{v:9.0f}" for v in xt))
for gamma in (0.5, 2):
    with np.errstate(all="ignore"):
        naive = slope(stepwise, xt, ones, gamma)
    fused = slope(partial(sigmoid_focal_loss, alpha=None, gamma=gamma), xt, ones)
    for name, g in (("stepwise", naive), ("fused", fused)):
        print(f"slope, gamma {gamma:<4}{name:9}" + "".join(f"{v:9.1g}" for v in g))
    assert np.isnan(naive).sum() == (3 if gamma < 1 else 1) and np.all(np.isfinite(fused))

# %% [markdown]
# ## The loss before the first step (sections 3.3 and 4.1)
#
# The last bias of the class tower starts at $-\log((1 - \pi)/\pi)$, so that every anchor says "object" with
# probability $\pi = 0.01$.  Then a pair of anchor and class costs $\frac34 \pi^2 \cdot -\log(1 - \pi)$ if it is
# background, and $\frac14 (1 - \pi)^2 \cdot -\log \pi$ if it is an object.  The sum is divided by the number of
# anchors that are responsible for an object.

# %%
def expected(prior, background, objects):
    return 0.75 * FL(1 - prior, 2) * background + 0.25 * FL(prior, 2) * objects


pairs = 120_087 * 80                                            # an 800 x 800 image, COCO's classes
start = [expected(0.01, 0, 1), expected(0.01, pairs, 0), expected(0.5, pairs, 0)]
print("\none object's anchor {:.4f}; all background {:.2f}, and without the prior {:,.0f}".format(*start))
assert np.allclose(start, [1.12838, 7.241, 1.2486e6], rtol=1e-4)

# %% [markdown]
# And a real network?  Its first weights are random, so its logits scatter a little around the bias; with the
# last weights at 0 they do not, and the pencil is exact.

# %%
data = md.shapes("train", images=4)
config = md.presets.small(data.classes)
samples = [data[i] for i in range(len(data))]
images = Tensor(np.stack([config.preprocess.prepare(sample.image, np.float64) for sample in samples]))


def first_loss(prior, weights_at_zero=False):
    """The classification loss of a fresh network, and by pencil."""
    model = md.RetinaNet(replace(config, head=replace(config.head, prior=prior)), seed=0)
    if weights_at_zero:
        last = model.head.class_subnet.final.weight
        last.data = 0 * last.data
    targets = build_targets(
        model.anchors(128, 128), [s.boxes for s in samples], [s.labels for s in samples], config.matcher
    )
    weights, _ = image_weights(config.loss, targets.positives)
    with md.no_grad():
        real = loss(*model(images), targets, weights, config.loss, config.coder).classification
    K, objects = len(data.classes), int(targets.positives.sum())
    # An anchor of an object is background to all other classes; ignored anchors count nowhere.
    background = K * int(np.sum(targets.labels == BACKGROUND)) + (K - 1) * objects
    return real, expected(prior, background, objects) / objects


print(f"\n{'four images of shapes, preset small':38}{'real':>10}{'by pencil':>12}")
for name, prior, zero in [
    ("prior 0.01, last weights 0", 0.01, True),
    ("prior 0.01, fresh", 0.01, False),
    ("no prior (p = 0.5), last weights 0", 0.5, True),
    ("no prior (p = 0.5), fresh", 0.5, False),
]:
    real, pencil = first_loss(prior, zero)
    print(f"{name:38}{real:10.4f}{pencil:12.4f}")
    assert np.isclose(real, pencil, rtol=1e-6 if zero else 0.1)
print(f"\nlook at figure_1.png, figure_5.png and figure_6.png in {out}")

# %% [markdown]
# A step-0 loss that is not about 1.13 means a wrong bias, a wrong reduction or wrong anchors: one look at the
# first line of a training log tells.
#
# ## Three things to remember
#
# 1. $(1 - p_t)^\gamma$ quiets examples that are right already; without it, the crowd is all that is heard.
# 2. Losses are computed from logits, with their gradient in closed form: the formula as written gives NaN.
# 3. Begin by saying "nothing here" with probability 0.99, and know the first loss before you see it.
#
# **Next**: chapter 4 trains a detector.
