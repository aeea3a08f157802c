"""Carries out training runs: beside each other, in any number of workers, remembering those that are done."""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from steadynorm.errors import ArgumentError, DataError, SteadynormError
from steadynorm.experiment.problem import Problem
from steadynorm.experiment.progress import Progress
from steadynorm.experiment.train import Run, RunSpec, train

__all__ = ["LOG_NAME", "Runner", "available_cores", "run_key"]

LOG_NAME: Final = "runs.jsonl"

_KEY_VERSION: Final = 2
"""Raised whenever `train` changes so that the same spec gives other numbers."""


def available_cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_key(spec: RunSpec, problem: Problem) -> str:
    """Identifies a run's result: everything that it depends on, hashed. The arm's names are not part of it."""
    fields = asdict(spec)
    fields["arm"] = [spec.arm.where, spec.arm.salt]
    text = json.dumps([_KEY_VERSION, problem.fingerprint, fields], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


_worker_problem: Problem | None = None


def _start_worker(problem: Problem) -> None:
    """Runs once per worker process: a large data set then travels there once, not with each run."""
    global _worker_problem
    _worker_problem = problem


def _train_in_worker(key: str, spec: RunSpec) -> tuple[str, Run]:
    if _worker_problem is None:
        raise RuntimeError("a worker was not told its problem")
    return key, train(spec, _worker_problem)


def _read_log(path: Path) -> dict[str, Run]:
    known: dict[str, Run] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(keepends=True), 1):
        if not line.endswith("\n"):
            break  # cut short by an interruption: that run is simply done again
        try:
            entry: dict[str, Any] = json.loads(line)
            known[entry["key"]] = Run.from_json(entry["run"])
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(
                f"{path}: line {number} is not a finished run ({error}). Remove the file to start over, "
                "or choose another folder with --out."
            ) from error
    return known


class Runner:
    """Runs specs, in parallel where asked to, and never the same one twice.

    Each run trains on one thread, so the number of workers changes how long it takes and nothing else.

    Args:
        problem: What is trained, on what.
        jobs: Workers; 1 trains in this process.
        folder: Where finished runs are logged (`runs.jsonl`), line by line, and read back from; None keeps them in
            memory only.
        progress: Told about each finished run.

    Raises:
        ArgumentError: jobs < 1.
        DataError: The log in `folder` cannot be read.
    """

    def __init__(self, problem: Problem, jobs: int, folder: Path | None, progress: Progress) -> None:
        if jobs < 1:
            raise ArgumentError(f"jobs must be at least 1, got {jobs}. Leave it out to use every core.")
        self.problem = problem
        self.progress = progress
        self._jobs = jobs
        self._log = None if folder is None else folder / LOG_NAME
        self._known = _read_log(self._log) if self._log is not None and self._log.exists() else {}
        if self._log is not None and self._log.exists():
            _drop_partial_line(self._log)

    def run(self, specs: Sequence[RunSpec]) -> list[Run]:
        """The result of each spec, in their order; those not known yet are trained now.

        A spec that occurs twice, or was run before, is not trained again. What has finished when this is interrupted
        stays known.
        """
        keys = [run_key(spec, self.problem) for spec in specs]
        missing = {key: spec for key, spec in zip(keys, specs, strict=True) if key not in self._known}
        # The longest first leaves the workers least idle at the end; seed by seed, they find their split in memory.
        queue = sorted(missing.items(), key=lambda item: (-item[1].steps * item[1].batch_size, item[1].seed, item[0]))
        self.progress.expect(len(queue))
        for key, run in self._train_all(queue):
            self._known[key] = run
            self._write(key, run)
            self.progress.done()
        return [self._known[key] for key in keys]

    def _train_all(self, queue: Sequence[tuple[str, RunSpec]]) -> Iterator[tuple[str, Run]]:
        if self._jobs == 1 or len(queue) < 2:
            for key, spec in queue:
                yield key, train(spec, self.problem)
            return
        from joblib import Parallel, delayed
        from joblib.externals.loky.process_executor import TerminatedWorkerError

        pool: Any = Parallel
        workers = pool(
            n_jobs=self._jobs,
            backend="loky",
            return_as="generator_unordered",
            batch_size=1,
            inner_max_num_threads=1,
            initializer=_start_worker,
            initargs=(self.problem,),
        )
        try:
            yield from workers(delayed(_train_in_worker)(key, spec) for key, spec in queue)
        except TerminatedWorkerError as error:
            raise SteadynormError(
                "a worker process was killed from outside, perhaps for want of memory. What had finished is kept where "
                "a folder was given (--out); run again, with fewer --jobs if memory is short."
            ) from error

    def _write(self, key: str, run: Run) -> None:
        if self._log is None:
            return
        with self._log.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"key": key, "run": run.as_json()}) + "\n")


def _drop_partial_line(path: Path) -> None:
    content = path.read_bytes()
    end = content.rfind(b"\n") + 1
    if end != len(content):
        with path.open("r+b") as file:
            file.truncate(end)
