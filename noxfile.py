"""Sessions: tests, lint, types, coverage, audit, benchmarks, gpu, docs, minimums; `uv run nox -s NAME`."""

import os
from pathlib import Path

import nox

nox.options.default_venv_backend = "none"
nox.options.sessions = ["lint", "types", "tests"]


@nox.session
def tests(session: nox.Session) -> None:
    """Run every test over all cores: the fast ones, then the slow ones. Arguments go to pytest instead."""
    if session.posargs:
        session.run("pytest", *session.posargs)
        return
    parallel = ("pytest", "--dist", "worksteal", "-q", "-n")
    environment = {
        # Many tests start processes; where bytecode is not kept, each of them would compile torch again.
        "PYTHONDONTWRITEBYTECODE": None,
        # As many processes as cores: more threads would only wait for each other.
        "OMP_NUM_THREADS": "1",
    }
    session.run(*parallel, "auto", env=environment)
    # Half of the slow ones wait for SuperLinks and SuperNodes, so there is room for more of them than cores.
    more = str((os.cpu_count() or 1) * 3 // 2)
    session.run(*parallel, more, "-m", "slow", "--durations=15", env=environment)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and formatting."""
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")


@nox.session
def types(session: nox.Session) -> None:
    """Check types: strictly in core and cli."""
    session.run("pyright")


_USERS_OF_CORE = ("tests/cli/test_count_params.py", "tests/fl/test_load.py", "tests/diffusion/test_load.py")


@nox.session
def coverage(session: nox.Session) -> None:
    """Run core's tests, and those of its users that hold its settings and counts, and list the lines none reaches."""
    cov = ("--cov=lowrank_core", "--cov-branch", "--cov-report=term-missing:skip-covered")
    tests = ("tests/core", "tests/fuzz/test_adapter_files.py", *_USERS_OF_CORE)
    session.run("pytest", *tests, "-q", "-n", "auto", "-m", "", *cov)


@nox.session
def audit(session: nox.Session) -> None:
    """Ask the OSV database about every installed package."""
    session.run("uv", "audit", "--preview-features", "audit-command", external=True)


@nox.session
def benchmarks(session: nox.Session) -> None:
    """Measure speed side by side with peers; minutes on a quiet machine. Peers run in environments of their own."""
    session.run("python", "benchmarks/vgg_step.py")
    session.run("python", "benchmarks/fl_round.py", *session.posargs)


# Tests that hold for every device, and what measures on one. Names are what `nox -s gpu -- NAME ...` chooses from.
_ON_A_GPU = {
    "tests": (
        *("pytest", "--device", "cuda", "-m", "", "-q", "-n", "0"),
        *("tests/core", "tests/diffusion/test_training.py", "tests/fl/test_execution.py"),
    ),
    "compose_kernel": ("benchmarks/compose_kernel.py",),
    "adapters": ("benchmarks/adapters.py", "--dtype", "bfloat16"),
    # LyCORIS's fused layers read a number from the device, which no graph can hold.
    "adapters-graphs": (
        *("benchmarks/adapters.py", "--dtype", "bfloat16", "--graphs"),
        *("--only", "PEFT", "PEFT patched"),
    ),
    # Every competitor is compiled at every shape and rank, so fewer of them.
    "adapters-compiled": (
        *("benchmarks/adapters.py", "--dtype", "bfloat16", "--compile"),
        *("--ranks", "8", "--only", "PEFT", "PEFT patched"),
    ),
    "diffusion": (
        *("benchmarks/diffusion.py", "--methods", "loha", "lora", "--batches", "1"),
        *("--variants", "plain", "checkpointing"),
    ),
    "diffusion-compiled": (
        *("benchmarks/diffusion.py", "--methods", "loha", "--batches", "1"),
        *("--variants", "compile", "--only", "PEFT"),
    ),
    "vgg_step": (
        *("benchmarks/vgg_step.py", "--precision", "bf16"),
        *("--ways", "sequential", "compiled", "graphs"),
    ),
}


@nox.session
def gpu(session: nox.Session) -> None:
    """Test and measure on a CUDA device, every result into gpu-results/; arguments name some of the parts."""
    unknown = [name for name in session.posargs if name not in _ON_A_GPU]
    if unknown:
        session.error(f"no part is called {', '.join(unknown)}; there are {', '.join(_ON_A_GPU)}")
    folder = Path("gpu-results")
    folder.mkdir(exist_ok=True)
    failed: list[str] = []
    for name in session.posargs or _ON_A_GPU:
        part = _ON_A_GPU[name]
        if part[0] != "pytest":
            part = ("python", *part, "--device", "cuda", "--json", str(folder / f"{name}.json"))
        try:
            session.run(*part, env={"PYTHONDONTWRITEBYTECODE": None})
        except nox.command.CommandFailed:  # the others still are worth the time that the device is there for
            failed.append(name)
    if failed:
        session.error(f"failed: {', '.join(failed)}")


@nox.session
def docs(session: nox.Session) -> None:
    """Check the documentation's examples and links, and build its site into site/."""
    session.run("pytest", "tests/test_documentation.py", "tests/test_commands_in_documentation.py", "-q")
    reference = "docs/reference/command-line.md"
    session.run("typer", "lowrank_cli.main", "utils", "docs", "--name", "lowrank", "--output", reference)
    session.run("uv", "run", "--group", "docs", "zensical", "build", "--strict", external=True)


@nox.session
def minimums(session: nox.Session) -> None:
    """Run the fast tests on the oldest versions the packages allow, in an environment that is thrown away (6 GB)."""
    pytest = ("pytest", "-n", "auto", "--dist", "worksteal", "-q")
    session.run("uv", "run", "--isolated", "--resolution=lowest-direct", *pytest, external=True)
