"""The examples of training over ranks, run as a reader would run them: by torchrun, and by python alone."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def output(processes: int, folder: Path, *examples: str) -> str:
    """What torchrun prints for an example, or python for several of them; they must leave nothing behind."""
    paths = [str(EXAMPLES / f"{example}.py") for example in examples]
    if processes > 1:
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), *paths]
    else:  # in one process, since most of the time goes into starting it
        command = ["-c", f"import runpy\nfor path in {paths}: runpy.run_path(path, run_name='__main__')"]
    with subprocess.Popen(
        [sys.executable, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    ) as process:
        try:
            said, errors = process.communicate(timeout=120)
        except BaseException:
            process.terminate()  # torchrun ends its workers on this; on SIGKILL it could not
            raise
    assert process.returncode == 0, said + errors
    assert not list(folder.iterdir())
    return said


def number(after: str, text: str) -> float:
    found = re.search(rf"{after}\s+([\d.e+-]+)", text)
    assert found, text
    return float(found[1])


def check_ddp(said: str, processes: int) -> None:
    assert said.startswith(f"{processes} ranks with ")
    shares = [int(share) for share in re.findall(r"\d+", said.splitlines()[0])[1:-1]]
    assert len(shares) == processes
    assert sum(shares) == 1797
    assert processes == 1 or shares[0] / 24 < number("examples,", said) / 1.9  # rank 0 has no data in half of the steps
    assert number("training accuracy", said) > 80
    assert number("ranks differ by", said) == 0
    assert number("from one process by", said) < 1e-9


def check_fsdp2(said: str, processes: int) -> None:
    for line, dtype in zip(said.splitlines(), ("float32", "bfloat16"), strict=True):
        assert line.startswith(f"{processes} ranks in torch.{dtype}:")
        assert "running statistics in torch.float32" in line
        assert number("training accuracy", line) > 90
        assert number("ranks differ by", line) == 0


CHECKS = {"ddp": check_ddp, "fsdp2": check_fsdp2}


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("example", CHECKS)
def test_on_several_ranks(example, processes, tmp_path):
    CHECKS[example](output(processes, tmp_path, example), processes)


def test_on_one_process_without_torchrun(tmp_path):
    lines = output(1, tmp_path, *CHECKS).splitlines()
    check_ddp("\n".join(lines[:-2]), 1)
    check_fsdp2("\n".join(lines[-2:]), 1)
