"""What `import deeptwist` adds to `import torch`, and how long `deeptwist --help` takes.

python benchmarks/startup.py
"""

import argparse
import statistics
import subprocess
import sys
import time

from deeptwist.measure.machine import describe_machine

COMMANDS = {
    "import torch": ["-c", "import torch"],
    "import torch, deeptwist and every public name": [
        "-c",
        "import torch, deeptwist; [getattr(deeptwist, name) for name in deeptwist.__all__]",
    ],
    "deeptwist --help": ["-m", "deeptwist", "--help"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", default=7, type=int)
    rounds = parser.parse_args().rounds
    samples: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(rounds):
        for name, words in COMMANDS.items():
            started = time.perf_counter()
            subprocess.run([sys.executable, *words], check=True, capture_output=True)
            samples[name].append(time.perf_counter() - started)
    for name, own in samples.items():
        print(f"{statistics.median(own):6.2f} s  {name}")
    torch, both, _ = samples.values()
    added = statistics.median(b - t for t, b in zip(torch, both, strict=True))
    print(f"{added:6.2f} s  is what deeptwist adds\n{describe_machine()}")


if __name__ == "__main__":
    main()
