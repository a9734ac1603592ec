"""Optimizers without a learning rate, with one setting for all problems, against NAdamW calibrated as long.

Kasimbeg et al. 2025, "How far away are truly hyperparameter-free learning algorithms?". Each optimizer is run on all
problems as published and with settings from a quasi-random search; the setting that does best on all problems together
is judged with other seeds, by AlgoPerf's score.
"""

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from scipy.stats import qmc

from ml.optim import OptimizerConfig, ScheduleConfig
from ml.studies.batch_sweep import clearly_less
from ml.studies.outcome import Budget, Measured, Outcome, Panel, Series
from ml.studies.performance_profile import UP_TO, profile, ratios, scores
from ml.studies.workloads import Workload, make_training, workloads
from ml.train.reporting.progress import ProgressDisplay

NAMES: Mapping[str, str] = {
    "nadamw": "NAdamW",
    "dog": "DoG",
    "dowg": "DoWG",
    "dadapt_adamw": "D-Adaptation",
    "prodigy": "Prodigy",
    "mechanic_adamw": "Mechanic",
    "cocob": "COCOB",
}
_RIVAL = "nadamw"
_WITH_MOMENTS = ("nadamw", "dadapt_adamw", "prodigy", "mechanic_adamw")
_MARGIN = 1.05  # a target is the best loss of tuned NAdamW times this
_CLOSE = 0.75  # of the rival's score: what "comes close" is taken to mean
_UNSOLVED = 2.0  # times the budget, when settings are ranked


@dataclasses.dataclass(frozen=True)
class Setting:
    """How large the study is.

    Attributes:
      steps: budget of each run.
      every: steps between evaluations.
      points: settings tried for each optimizer.
      rates: of NAdamW, to choose from for each problem where targets are set.
      byte_examples: see `ml.studies.workloads.workloads`.
      seeds: to judge with.
      tuning_seeds: to set targets and to calibrate with.
    """

    steps: int
    every: int
    points: int
    byte_examples: int
    rates: tuple[float, ...] = (0.001, 0.003, 0.01, 0.03)
    seeds: tuple[int, ...] = (1, 2, 3)
    tuning_seeds: tuple[int, ...] = (11, 12)


SETTINGS: Mapping[Budget, Setting] = {
    "cpu": Setting(steps=600, every=20, points=8, byte_examples=2**14),
    "gpu": Setting(steps=4000, every=50, points=20, byte_examples=2**18),
}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """An optimizer and all of its setting."""

    optimizer: OptimizerConfig
    schedule: ScheduleConfig


def run(budget: Budget) -> Outcome:
    """See the module's docstring."""
    return study(SETTINGS[budget])


def study(setting: Setting) -> Outcome:
    """Sets targets, calibrates and judges."""
    problems = workloads(setting.byte_examples)
    tuned = [_recipe(_RIVAL, rate, 0.1, 0.01, 0.05, "cosine") for rate in setting.rates]
    recipes = {name: candidates(name, setting.points) for name in NAMES}
    runs = [*tuned, *(recipe for each in recipes.values() for recipe in each)]
    curves = iter(_curves(problems, runs, setting))
    of_tuned = [next(curves) for _ in tuned]
    tuning = len(setting.tuning_seeds)
    targets = _MARGIN * np.min([each[:, :tuning].mean(axis=1).min(axis=1) for each in of_tuned], axis=0)
    times = {
        name: [steps_to_targets(next(curves), targets, setting.every) for _ in each] for name, each in recipes.items()
    }
    return judge(setting, [problem.name for problem in problems], targets, recipes, times)


def candidates(name: str, points: int) -> list[Recipe]:
    """The published setting first (but of the rival, which has none for all problems), then a quasi-random search."""
    published = [] if name == _RIVAL else [Recipe(OptimizerConfig(name, 1.0), ScheduleConfig(kind="constant"))]
    shapes = "constant", "linear", "cosine"
    # AlgoPerf's search space of NAdamW (Dahl et al. 2023, table 7), and decays of both shapes.
    low, high = [-4.0, math.log10(4e-3), -4.0, 0.0, 0.0], [-2.0, -1.0, -1.0, 0.2, len(shapes)]
    drawn = qmc.scale(qmc.Halton(len(low), seed=0).random(points), low, high)
    return published + [
        _recipe(name, 10**rate if name == _RIVAL else 1.0, 10**momentum, 10**decay, warmup, shapes[int(shape)])
        for rate, momentum, decay, warmup, shape in drawn
    ]


def _recipe(name: str, rate: float, one_minus_b1: float, decay: float, warmup: float, shape: str) -> Recipe:
    options = {"b1": 1 - one_minus_b1} if name in _WITH_MOMENTS else {}
    schedule = ScheduleConfig(kind=shape, warmup_fraction=warmup)  # type: ignore[arg-type]
    return Recipe(OptimizerConfig(name, rate, weight_decay=decay, options=options), schedule)


def _curves(problems: Sequence[Workload], runs: Sequence[Recipe], setting: Setting) -> list[np.ndarray]:
    """Held-out losses of each recipe, ``[problems, seeds, evaluations]``, the tuning seeds first."""
    seeds = setting.tuning_seeds + setting.seeds
    jobs = [(problem, recipe) for recipe in runs for problem in problems]
    losses = []

    def train(job: tuple[Workload, Recipe]) -> np.ndarray:
        problem, recipe = job
        training = make_training(problem, recipe.optimizer, recipe.schedule, steps=setting.steps, every=setting.every)
        return training(seeds)

    with ProgressDisplay(len(jobs)) as progress, ThreadPoolExecutor(os.cpu_count()) as pool:
        for (problem, _), curve in zip(jobs, pool.map(train, jobs), strict=True):
            losses.append(curve)
            seen = setting.steps * problem.batch_size * len(seeds)
            progress.update(len(losses), loss=float(curve[:, -1].mean()), tokens=seen)
    return list(np.reshape(losses, (len(runs), len(problems), len(seeds), -1)))


def steps_to_targets(curves: np.ndarray, targets: np.ndarray, every: int) -> np.ndarray:
    """Steps until ``curves [problems, seeds, evaluations]`` first reach ``targets [problems]``, or infinity."""
    reached = curves <= targets[:, None, None]
    return np.where(reached.any(axis=2), (reached.argmax(axis=2) + 1.0) * every, math.inf)


def judge(
    setting: Setting,
    problems: Sequence[str],
    targets: np.ndarray,
    recipes: Mapping[str, Sequence[Recipe]],
    times: Mapping[str, Sequence[np.ndarray]],
) -> Outcome:
    """What the ``times`` (by optimizer, one ``[problems, seeds]`` for each recipe) say of the claim."""
    tuning = len(setting.tuning_seeds)

    def cost(steps: np.ndarray) -> float:
        return float(np.minimum(steps[:, :tuning] / setting.steps, _UNSOLVED).mean())

    chosen = {name: int(np.argmin([cost(steps) for steps in each])) for name, each in times.items()}
    entries = {NAMES[name]: times[name][i] for name, i in chosen.items()}
    entries |= {f"{NAMES[name]}, published": each[0] for name, each in times.items() if name != _RIVAL}
    by_seed = [
        scores({name: steps[:, tuning + i] for name, steps in entries.items()}) for i in range(len(setting.seeds))
    ]
    of = {name: np.array([each[name] for each in by_seed]) for name in entries}
    free = [name for name in NAMES if name != _RIVAL]
    # Chosen without a look at the seeds that judge.
    best = NAMES[min(free, key=lambda name: cost(times[name][chosen[name]]))]
    ours, rival = of[best], of[NAMES[_RIVAL]]
    holds = clearly_less(ours, rival) and float(ours.mean()) >= _CLOSE * float(rival.mean())
    return Outcome(
        paper="How far away are truly hyperparameter-free learning algorithms? (Kasimbeg et al. 2025)",
        url="https://arxiv.org/abs/2505.24005",
        have="DoG, DoWG, D-Adaptation, Prodigy, Mechanic, COCOB (`ml/optim/learning_rate_free.py`)",
        claim="With one calibrated setting for all problems, the best learning-rate-free optimizer comes close to, but "
        "stays below, NAdamW calibrated as long",
        setup=_setup(setting, problems, of, chosen, times),
        baseline=Measured(NAMES[_RIVAL], tuple(map(float, rival))),
        ours=Measured(best, tuple(map(float, ours))),
        unit="AlgoPerf score",
        relation="<",
        holds=holds,
        seeds=setting.seeds,
        reason="" if holds else _reason(best, ours, rival),
        panels=_panels(entries, tuning),
        details={
            "targets": dict(zip(problems, map(float, targets), strict=True)),
            "scores": {name: list(map(float, values)) for name, values in of.items()},
            "calibrated": {NAMES[name]: _described(recipes[name][i]) for name, i in chosen.items()},
        },
    )


def _described(recipe: Recipe) -> dict[str, object]:
    return {
        "learning_rate": recipe.optimizer.learning_rate,
        "weight_decay": recipe.optimizer.weight_decay,
        "options": dict(recipe.optimizer.options),
        "schedule": recipe.schedule.kind,
        "warmup_fraction": recipe.schedule.warmup_fraction,
    }


def _reason(best: str, ours: np.ndarray, rival: np.ndarray) -> str:
    if ours.mean() >= rival.mean():
        return f"{best} scores {ours.mean():.2f}, NAdamW {rival.mean():.2f}: none the worse for having no rate"
    if ours.mean() < _CLOSE * rival.mean():
        return f"{best} scores {ours.mean():.2f}, far below NAdamW's {rival.mean():.2f}"
    return f"{best} ({ours.mean():.2f}) cannot be told from NAdamW ({rival.mean():.2f}) with {len(ours)} seeds"


def _setup(
    setting: Setting,
    problems: Sequence[str],
    of: Mapping[str, np.ndarray],
    chosen: Mapping[str, int],
    times: Mapping[str, Sequence[np.ndarray]],
) -> str:
    free = [name for name in times if name != _RIVAL]
    published = np.mean([of[f"{NAMES[name]}, published"].mean() for name in free])
    calibrated = np.mean([of[NAMES[name]].mean() for name in free])
    kept = ", ".join(NAMES[name] for name in free if chosen[name] == 0)
    note = f" (as published is best for {kept})" if kept else ""
    return (
        f"{len(problems)} problems ({'; '.join(problems)}), {setting.steps} steps each; one is solved at a held-out "
        f"loss of {_MARGIN:g} times the best of NAdamW with a rate of its own there. {setting.points} quasi-random "
        "settings (momentum, decay, warm-up, schedule; NAdamW's rate) for every optimizer, chosen for all problems "
        f"together on {len(setting.tuning_seeds)} other seeds. Counted is the area under the performance profile up to "
        f"{UP_TO:g} times the best time. All six average {published:.2f} as published, {calibrated:.2f} "
        f"calibrated{note}. Holds if the best one's score lies below NAdamW's by more than two standard errors, and is "
        f"at least {_CLOSE:.0%} of it."
    )


def _panels(entries: Mapping[str, np.ndarray], tuning: int) -> tuple[Panel, ...]:
    """Profiles over problems and seeds together."""
    tau = np.linspace(1, UP_TO, 61)
    found = ratios({name: steps[:, tuning:].ravel() for name, steps in entries.items()})

    def panel(title: str, published: bool) -> Panel:
        shown = {n: r for n, r in found.items() if n.endswith(", published") == published or n == NAMES[_RIVAL]}
        series = tuple(
            Series(name.removesuffix(", published"), tuple(map(float, tau)), tuple(map(float, profile(ratio, tau))))
            for name, ratio in shown.items()
        )
        return Panel("times the best number of steps", "share of problems solved", series, title=title)

    return panel("calibrated", published=False), panel("as published (NAdamW calibrated)", published=True)
