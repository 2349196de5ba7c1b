"""Fuzz the SMTP machine, and what is before Salmon's parser::

    make fuzz                                    # two minutes or so
    make fuzz FULL=1                             # a million inputs
    make fuzz SEED=2                             # others
    python tests/fuzz/campaign.py receiver FILE  # one input again, with the traceback

The first three run every target over its seeds and over new inputs: ``FUZZ_RUNS`` says how many,
and ``SEED`` which ones.  Unless you give it, the seed is the commit, so the next one tries others.

With atheris it is guided by coverage; where that cannot be installed, hypothesis runs the same
properties over a grammar, on fewer inputs.  A guided run begins alike and soon goes its own way,
whatever ``SEED`` says: what is covered depends on the challenges of a login, too.  So what it finds
out stays in the virtual environment: the inputs that reached something new, and those that broke a
property.
"""

from __future__ import annotations

import importlib.util
import io
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from coverage import Coverage
from grammar import HERE, SEEDS, inputs, seeds

sys.path.insert(0, str(HERE.parent))
from support.sample import SEED, again, amount, chance

WORK = Path(sys.prefix) / "fuzz"
CRASHES = WORK / "crashes"

# Of all the inputs, in per cent: where there is more to find, and more to lose.  One of the parser
# takes as long as a hundred others.
SHARES = {"receiver": 45, "sender": 33, "session": 15, "replies": 5, "proxy": 1, "parser": 1}
# Inputs that take two minutes or so.
SAMPLE = 150_000
# libFuzzer wants a number that is not 0, of 32 bits.
NUMBER = chance().randrange(1, 1 << 32)
# hypothesis takes this much longer to make an input.
WITHOUT_ATHERIS = 50
LIBFUZZER = (
    "-max_len=300",  # a dialogue of a dozen lines; the limits under test are smaller
    "-rss_limit_mb=1024",
    "-print_final_stats=0",
    f"-dict={HERE / 'smtp.dict'}",
)
# Seconds for one input.  A message may be of 256 KiB, and the target has the time for it.
TIMEOUTS = {"parser": 60}
_DONE = re.compile(r"#(\d+)\s+DONE\s+cov: (\d+)")
_PROGRESS = re.compile(r"#\d+\s+(?:INITED|pulse|DONE)\s")


def one_input(target: str, path: str) -> None:
    """One input, with the traceback of what it breaks."""
    import properties

    properties.TARGETS[target](Path(path).read_bytes())
    print("every property holds")


def main() -> int:
    total = int(os.environ.get("FUZZ_RUNS") or amount(1_000_000, sampled=SAMPLE))
    shutil.rmtree(WORK, ignore_errors=True)
    CRASHES.mkdir(parents=True)
    guided = importlib.util.find_spec("atheris") is not None
    if not guided:
        total //= WITHOUT_ATHERIS
        print("atheris is not here (it has no wheel for every machine and Python).")
        print(f"hypothesis takes its place: {total} inputs, and no coverage guides them.")
    print(f"{total} inputs, SEED={SEED}", flush=True)
    start, ran, broken = time.monotonic(), 0, False
    for target, share in SHARES.items():
        runs = max(1, total * share // 100)
        print(f"== {target}: {len(seeds(target))} seeds, {runs} inputs", flush=True)
        began = time.monotonic()
        count, note = (_atheris if guided else _hypothesis)(target, runs)
        seconds = time.monotonic() - began
        ran += count
        broken = broken or count < runs
        print(f"{target}: {count} inputs in {seconds:.0f} s, {note}", flush=True)
    seconds = time.monotonic() - start
    print(f"fuzz: {ran} inputs in {seconds:.0f} s ({ran / seconds:.0f}/s)", end="")
    if broken:
        print(f"; a property does not hold, see above; again: {again('fuzz')}")
        return 1
    print(f"; the corpus covers {_covered()} (lines and branches)")
    return 0


def _atheris(target: str, runs: int) -> tuple[int, str]:
    """Run libFuzzer; returns how many inputs it got through, and what it covered."""
    corpus = WORK / target
    corpus.mkdir()
    script = HERE / f"fuzz_{target}.py"
    # By name: libFuzzer reads a directory in whatever order the file system has it.
    first = ",".join(str(path) for path in seeds(target))
    process = subprocess.Popen(
        [
            *(sys.executable, str(script), *LIBFUZZER, f"-runs={runs}", f"-seed={NUMBER}"),
            f"-timeout={TIMEOUTS.get(target, 10)}",
            *(f"-artifact_prefix={CRASHES}/{target}-", f"-seed_inputs={first}", str(corpus)),
        ],
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env={**os.environ, "PYTHONHASHSEED": "0"},
    )
    assert process.stderr is not None
    done, tail = None, list[str]()
    for line in process.stderr:
        if _PROGRESS.match(line):
            print(line.rstrip(), flush=True)
        done = _DONE.match(line) or done
        if not line.startswith("#"):
            tail = [*tail[-40:], line]
    if process.wait() == 0 and done:
        return int(done[1]), f"{done[2]} edges, {len(list(corpus.iterdir()))} inputs kept"
    sys.stdout.writelines(tail)
    crashes = sorted(CRASHES.glob(f"{target}-*"))
    return 0, f"BROKEN: {_advice(target, crashes[-1])}" if crashes else "BROKEN: no input was kept"


def _hypothesis(target: str, runs: int) -> tuple[int, str]:
    import properties
    from hypothesis import HealthCheck, Phase, given, seed, settings

    last = b""

    @seed(NUMBER)
    @given(inputs(target))
    @settings(
        max_examples=runs,
        deadline=None,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    def run(data: bytes) -> None:
        nonlocal last
        last = data
        properties.TARGETS[target](data)

    try:
        for path in seeds(target):
            last = path.read_bytes()
            properties.TARGETS[target](last)
        run()
    except Exception as error:
        crash = CRASHES / f"{target}-crash"
        crash.write_bytes(last)
        return 0, f"BROKEN: {type(error).__name__}: {error}\n{_advice(target, crash)}"
    return runs, "no coverage"


def _advice(target: str, crash: Path) -> str:
    return (
        f"{crash}\nreproduce it:  {sys.executable} {__file__} {target} {crash}\n"
        f"when it is mended, keep it in {SEEDS / target} under a name that says what it shows"
    )


def _covered() -> str:
    """How much of the code the seeds and the grown corpus reach, by coverage.py."""
    measured = ["salmon_revsmtp.smtp"]
    for name in [name for name in sys.modules if name.startswith(("salmon_revsmtp", "properties"))]:
        del sys.modules[name]
    measure = Coverage(data_file=None, branch=True, source_pkgs=measured, config_file=False)
    measure.start()
    import properties

    for target, check in properties.TARGETS.items():
        if target in ("parser", "proxy"):  # they are no part of the machine
            continue
        grown = sorted((WORK / target).glob("*"))
        for path in [*seeds(target), *grown]:
            check(path.read_bytes())
    measure.stop()
    return f"{measure.report(file=io.StringIO()):.1f} % of the machine"


if __name__ == "__main__":
    if sys.argv[1:]:
        one_input(*sys.argv[1:])
    else:
        sys.exit(main())
