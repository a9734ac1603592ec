"""Studies: a paper's claim, put to the test here. A study is a module of this package with ``run(budget) -> Outcome``.

``budget`` is ``"cpu"`` (at most about three minutes of two cores) or ``"gpu"``. The first line of the module's
docstring is what ``scripts/reproduce.py --list`` shows. There is no table to enter a study in: `ml.studies.registry`
lists the package and takes every module that defines ``run``.
"""
