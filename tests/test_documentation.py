"""The documentation's Python examples run, and print what they say; its links and presets exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"```python\n(.*?)```(?:\s*```text\n(.*?)```)?", re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_examples_run_one_after_the_other_and_print_what_the_page_says(page, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {}
    for code, output in BLOCK.findall(page.read_text(encoding="utf-8")):
        exec(compile(code, str(page), "exec"), scope)
        printed = capsys.readouterr().out
        if output:
            assert printed == output


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def test_every_key_of_fine_tuning_is_documented():
    from lowrank_diffusion.config import DiffusionConfig

    page = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("diffusion-*.md"))
    for name, field in DiffusionConfig.model_fields.items():
        for key in getattr(field.annotation, "model_fields", {}):
            assert f"`{name}.{key}`" in page, f"{name}.{key}"


def test_every_configuration_key_is_documented():
    from lowrank_fl.config import RunConfig

    page = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("federated*.md"))
    for name, field in RunConfig.model_fields.items():
        keys = getattr(field.annotation, "model_fields", {})
        for key in keys or ([name] if name != "sweep" else []):
            assert re.search(rf"\b{key}\b", page), f"{name}.{key}"


def test_what_is_said_of_other_trainers_names_tests_that_are_there():
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", (ROOT / "docs" / "trainers.md").read_text(encoding="utf-8"))
    assert len(named) > 30
    for file, test in named:
        assert f"def {test}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), test
