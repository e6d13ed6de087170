"""Before hours are spent: data, settings and machine looked over as a whole, and a verdict."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from minidet.data import Dataset, coco
from minidet.data.coco import annotation_file, image_places
from minidet.data.refusal import DataError
from minidet.inspection.advice import finding
from minidet.inspection.annotation_checks import check_annotations, check_classes
from minidet.inspection.coverage import Coverage, best_possible, check_coverage, limits_text, measure_coverage
from minidet.inspection.evidence import check_evidence
from minidet.inspection.findings import MUST_FIX, SEVERITIES, WARNING, Finding, exit_status, verdict
from minidet.inspection.image_checks import check_copies, check_images, image_folder
from minidet.inspection.process import resident
from minidet.inspection.raw import Raw, from_dict, read_raw
from minidet.inspection.trial import HEART_SHARE, Trial, check_trial, duration, run_trial
from minidet.models import RetinaNet, RetinaNetConfig, presets
from minidet.plots.diagnosis import diagnosis_page
from minidet.training import TrainConfig, read_checkpoint
from minidet.training.checkpoint import find_checkpoint, is_checkpoint
from minidet.weights import load_initial


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """What the doctor found.

    Attributes:
        name: of the data.
        splits: by name, what was counted.
        findings: the worst first.
        coverage, limits: of the training split's objects by the anchors; None without any.
        trial: None where something must be fixed before.
    """

    name: str
    splits: dict[str, str]
    findings: tuple[Finding, ...]
    coverage: Coverage | None = None
    limits: str = ""
    trial: Trial | None = None

    @property
    def status(self) -> int:
        """0 go, 1 warnings, 2 must not train: what the command exits with."""
        return exit_status(self.findings)

    def table(self) -> str:
        """Everything as text."""
        parts = [f"{name}: {text}" for name, text in self.splits.items()]
        if self.coverage is not None:
            parts += ["", self.coverage.table(), self.limits]
        parts += ["", self.trial.table()] if self.trial else []
        parts += [line for one in self.findings for line in ("", one.text())]
        return "\n".join([*parts, "", verdict(self.findings)])

    def to_json(self) -> dict:
        """The same for programs."""
        trial, coverage = self.trial, self.coverage
        return {
            "data": self.name,
            "status": self.status,
            "verdict": verdict(self.findings),
            "splits": self.splits,
            "findings": [asdict(one) for one in self.findings],
            "coverage": coverage and {name: (len(r), *coverage.shares(r)) for name, r in _groups(coverage).items()},
            "trial": trial and asdict(trial) | {
                "step_seconds": trial.step_seconds, "total_seconds": trial.total_seconds, "peak_bytes": trial.peak,
            },
        }  # fmt: skip

    def save(self, folder: str | Path) -> None:
        """Write doctor.txt, doctor.json and doctor.png."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "doctor.txt").write_text(self.table() + "\n")
        (folder / "doctor.json").write_text(json.dumps(self.to_json(), indent=1) + "\n")
        self.draw(folder / "doctor.png")

    def draw(self, path: str | Path) -> Path:
        """One page: the findings, the objects among the anchors' limits, the trial."""
        coverage, trial = self.coverage, self.trial
        side, limits = np.geomspace(2, 1500, 80), np.zeros((80, 80))
        thresholds, shares = (0.4, 0.5), {}
        if coverage is not None:
            wide, high = np.meshgrid(side, side)
            limits = best_possible(np.stack([wide.ravel(), high.ravel()], axis=1), coverage.config.anchors)
            thresholds = coverage.config.matcher.low, coverage.config.matcher.high
            shares = {name: (len(rows), coverage.shares(rows)) for name, rows in _groups(coverage).items()}
            classes = sorted((n for n in shares if n.startswith("class ")), key=lambda n: shares[n][1][0])[10:]
            shares = {name: value for name, value in shares.items() if name not in classes}
        costs = trial and f"{trial.steps:,} steps and validation: {duration(trial.total_seconds)}"
        return diagnosis_page(
            path, title=self.name, verdict=verdict(self.findings), signal=("ok", WARNING, MUST_FIX)[self.status],
            findings=[(f.severity, f"{f.what}\nfix: {f.fix}") for f in self.findings],
            sides=coverage.sides if coverage else np.zeros((0, 2)), iou=coverage.iou if coverage else np.zeros(0),
            thresholds=thresholds, limits=(side, limits.reshape(80, 80)), shares=shares,
            heart=trial.heart if trial else (), goal=HEART_SHARE, seconds=trial.seconds if trial else {},
            memory=trial.memory if trial else {}, costs=costs or "no training was tried",
        )  # fmt: skip


def _groups(coverage: Coverage) -> dict[str, np.ndarray]:
    return {"all": np.arange(len(coverage))} | coverage.groups


Settings = Callable[[Sequence[str], int], tuple[RetinaNetConfig, TrainConfig]]


def doctor(
    data: str | Path | Dataset,
    *,
    split: str = "train",
    validate: str | Dataset | None = "val",
    settings: Settings | None = None,
    init: str | Path | None = None,
    quick: bool = False,
    progress: bool = False,
) -> Diagnosis:
    """Look a data set, settings and this machine over before training, and say all that is wrong, with the cure.

    `data` is a folder in COCO's layout, one json file, or a data set; `validate` another split of the folder, or
    another data set.  `settings(classes, images)` gives model and recipe; without it, the `small` preset and its
    recipe.  `init` are first weights.  `quick` opens a sample of the pictures, and tries for a quarter of the time.
    """
    program = resident()
    sources = dict(_sources(data, split, validate))
    findings: list[Finding] = []
    raws: dict[str, Raw] = {}
    for name, source in sources.items():
        try:
            is_file = isinstance(source, Path)
            raws[name] = read_raw(source, source.name) if is_file else from_dict(repr(source), source.ground_truth())
        except (ValueError, OSError, RecursionError) as error:
            findings.append(finding("json-unreadable", file=source, error=error))
    findings += _data_findings(sources, raws, split, quick, progress)
    if split not in raws:
        return Diagnosis(str(data), {}, _sorted(findings))
    train = raws[split]
    classes = tuple(dict.fromkeys(name for _, name in sorted(dict(train.categories).items())))
    if init is not None and is_checkpoint(init):
        saved = read_checkpoint(init)
        pairs = list(zip(saved.category_ids, saved.classes, strict=True))
        findings += check_classes(train.path, train.categories, str(init), pairs, renewed=True)
    if len(raws) > 1:
        other = next(name for name in raws if name != split)
        checked = raws[other].path, raws[other].categories, train.path, train.categories
        findings += check_classes(*checked, renewed=False)
    counts = {
        name: f"{len(raw.names):,} images, {len(raw.ids):,} boxes, {len(raw.categories)} classes"
        for name, raw in raws.items()
    }
    if not classes:
        return Diagnosis(str(data), counts, _sorted(findings))
    config, recipe = settings(classes, len(train.names)) if settings else (presets.small(classes), TrainConfig())
    model = RetinaNet(config, seed=recipe.seed)
    coverage, found = _covered(train, config, model)
    findings += found
    trial = None
    if exit_status(findings) < 2:
        trial, found = _tried(model, data, split, validate, recipe, init, program, quick)
        findings += found
    return Diagnosis(str(data), counts, _sorted(findings), coverage, limits_text(config) if coverage else "", trial)


def _sorted(findings: list[Finding]) -> tuple[Finding, ...]:
    return tuple(sorted(findings, key=lambda one: SEVERITIES.index(one.severity)))


def _sources(data, split: str, validate) -> Iterator[tuple[str, Path | Dataset]]:
    """What to look at, by the name of the split: json files, or data sets."""
    if not isinstance(data, str | Path):
        yield split, data
        if validate is not None and not isinstance(validate, str):
            yield "val", validate
        return
    path = Path(data)
    yield split, path if path.is_file() else annotation_file(path, split)
    if path.is_dir() and validate not in (None, split):
        try:
            yield validate, annotation_file(path, validate)
        except DataError:  # there may be none: training does without
            return


def _data_findings(sources, raws: dict[str, Raw], split: str, quick: bool, progress: bool) -> Iterator[Finding]:
    pictures = []
    for name, raw in raws.items():
        yield from check_annotations(raw, learned=name == split)
        if isinstance(file := sources[name], Path):
            root = file.parent.parent if file.parent.name == "annotations" else file.parent
            places = image_places(root, file.stem.removeprefix("instances_").removesuffix("2017"))
            pictures.append((raw, image_folder(raw, places)))
            yield from check_images(*pictures[-1], quick=quick, progress=progress)
            yield from check_evidence(*pictures[-1])
    yield from check_copies(pictures)


def _covered(raw: Raw, config: RetinaNetConfig, model: RetinaNet) -> tuple[Coverage | None, list[Finding]]:
    rows = np.flatnonzero(raw.usable & ~raw.crowd)
    if not len(rows):
        return None, []
    boxes, sizes = raw.bbox[rows].copy(), raw.sizes[raw.image_row[rows]][:, ::-1]
    boxes[:, 2:] += boxes[:, :2]
    order = np.argsort(np.argsort([number for number, _ in raw.categories]))
    coverage = measure_coverage(config, model.maps, boxes, sizes, order[raw.category_row[rows]])
    least = len(model.backbone.channels)
    return coverage, list(check_coverage(coverage, model.maps, boxes, sizes, least))


def _tried(model, data, split, validate, recipe, init, program, quick) -> tuple[Trial | None, list[Finding]]:
    """The trial and what it means; or why training could not even begin."""
    try:
        weights = find_checkpoint(init) if init is not None and Path(init).is_dir() else init
        loaded = load_initial(model, weights).loaded if weights is not None else ()
        if isinstance(data, str | Path):
            sources = dict(_sources(data, split, validate))
            train, *others = (coco(data if Path(data).is_file() else Path(data), name) for name in sources)
            validation = others[0] if others else None
        else:
            train, validation = data, None if isinstance(validate, str) else validate
        trial = run_trial(model, train, validation, recipe, program=program, quick=quick)
    except (ValueError, OSError, RuntimeError) as error:
        return None, [finding("refused", error=error)]
    if any(name.startswith("head.class_subnet.final") for name in loaded):
        trial = Trial(**(asdict(trial) | {"expected_loss": None}))
    return trial, list(check_trial(trial, recipe))
