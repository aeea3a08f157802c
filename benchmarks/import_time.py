"""What `import steadynorm` costs on top of `import torch`, in fresh interpreters.

    python benchmarks/import_time.py [--repeats 20]

Three figures, because each has a weakness. Inside one process, once torch is there: the seconds of the import, and
those of the import and the first use of the layers, since names are loaded lazily. From outside: the wall time of a
process that imports both less that of one that imports torch alone. All kinds take turns, so that a machine that slows
down slows all of them.
"""

import argparse
import statistics
import subprocess
import sys
import time

INSIDE = "import time, torch; t = time.perf_counter(); {code}; print(time.perf_counter() - t)"
IMPORT = "import steadynorm"
LAYERS = "import steadynorm as sn; sn.BatchNorm2d, sn.Moments, sn.init"
BOTH = "import torch, steadynorm"
TORCH = "import torch"


def wall(code: str) -> float:
    """Seconds that a fresh interpreter takes to run `code`."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - start


def inside(code: str) -> float:
    """Seconds of `code` in a fresh interpreter that has imported torch."""
    command = [sys.executable, "-c", INSIDE.format(code=code)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def line(name: str, seconds: list[float]) -> str:
    """One row: the median, with the 20th and 80th percentile."""
    cuts = statistics.quantiles(seconds, n=5)
    return f"{name:42} {statistics.median(seconds):7.3f} s   (p20 {cuts[0]:.3f}, p80 {cuts[-1]:.3f})"


def main() -> None:
    """Measures and prints both figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20)
    repeats = parser.parse_args().repeats
    wall(BOTH)  # fills the disk cache and the byte code
    torch, differences, within, used = [], [], [], []
    for _ in range(repeats):
        torch.append(wall(TORCH))
        differences.append(wall(BOTH) - torch[-1])
        within.append(inside(IMPORT))
        used.append(inside(LAYERS))
    print(line("import torch", torch))
    print(line("import steadynorm, inside one process", within))
    print(line("import steadynorm and use the layers", used))
    print(line("import steadynorm, difference of processes", differences))


if __name__ == "__main__":
    main()
