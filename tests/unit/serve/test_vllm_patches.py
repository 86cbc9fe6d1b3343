"""Every patch of vLLM: whether it fits is seen from source text, and what happens when it does not.
With real engines in tests/e2e/test_patches.py.
"""

from __future__ import annotations

import importlib
import json
import logging
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.v1.engine import utils

from packhorse.serve.engines.vllm import arguments, patches, plugin
from packhorse.serve.engines.vllm.arguments import (
    EXECUTOR,
    SCHEDULER,
    WORKER,
    engine_args,
    max_active_loras,
    refuse_unpatched,
    refuse_what_would_crash,
)
from packhorse.serve.engines.vllm.patches import PATCHES, forkserver, probing
from packhorse.serve.errors import StartupError
from packhorse.serve.settings.engine import EngineSettings
from tests.conftest import ROOT

SPEED = [name for name, patch in PATCHES.items() if patch.kind == "speed"]
CORRECTNESS = [name for name, patch in PATCHES.items() if patch.kind == "correctness"]
REASON = "somebody changed it"


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing has been decided yet."""
    monkeypatch.setattr(patches, "_reasons", {})
    monkeypatch.setattr(patches, "_states", {})
    probing._text.cache_clear()


@pytest.fixture
def unfit(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes patches not fit."""

    def make(*names: str) -> None:
        for name in names:
            monkeypatch.setitem(patches._reasons, name, REASON)

    return make


def settings(**fields: Any) -> EngineSettings:
    return EngineSettings.model_validate(fields)


def copied(name: str, folder: Path) -> Path:
    """A root with those source files of vLLM (and torch) alone that the patch looks at."""
    for module in PATCHES[name].applies_to:
        package, *parts = module.split(".")
        found = find_spec(package)
        assert found is not None
        assert found.submodule_search_locations
        source = Path(found.submodule_search_locations[0]).joinpath(*parts)
        source = source / "__init__.py" if source.is_dir() else source.with_suffix(".py")
        target = folder / package / source.relative_to(found.submodule_search_locations[0])
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    return folder


def file_of(root: Path, module: str) -> Path:
    place = root.joinpath(*module.split("."))
    return place / "__init__.py" if place.is_dir() else place.with_suffix(".py")


def change(root: Path, module: str, member: str, edit: Callable[[str], str]) -> None:
    """Edit the source of one member of a copied module."""
    path = file_of(root, module)
    text = path.read_text()
    block = "\n" + text
    for depth, name in enumerate(member.split(".") if member else ()):
        found = probing._last_block(block, name, depth * 4)
        assert found is not None
        block = found
    block = block.removeprefix("\n")
    edited = edit(block)
    assert edited != block
    path.write_text(text.replace(block, edited))
    probing._text.cache_clear()


def expectations(form: str) -> list[tuple[str, str, str, str]]:
    """Patch, module, member and expectation, of all that have this form."""
    return [
        (name, module, member, expected)
        for name, patch in PATCHES.items()
        for module, members in patch.applies_to.items()
        for member, expected in members.items()
        if expected.startswith(form)
    ]


def short(text: str) -> str:
    return text.rpartition(".")[2]


@pytest.mark.parametrize("name", PATCHES)
def test_every_patch_fits_the_installed_vllm(name: str, tmp_path: Path) -> None:
    assert PATCHES[name].probe() is None
    assert PATCHES[name].probe(copied(name, tmp_path)) is None


@pytest.mark.parametrize("name", PATCHES)
def test_a_patch_declares_itself(name: str) -> None:
    """What is read from its text is what its module says."""
    module: Any = importlib.import_module(f"packhorse.serve.engines.vllm.patches.{name}")
    patch = PATCHES[name]
    assert (name, patch.kind) == (module.NAME, module.KIND)
    assert patch.applies_to == module.APPLIES_TO
    assert patch.without == module.WITHOUT
    assert patch.without.endswith(".")
    assert module.probe() is None


FOUR = ("name", "module", "member", "expected")


@pytest.mark.parametrize(FOUR, expectations("sha256:"), ids=short)
def test_a_changed_source_is_noticed(
    name: str, module: str, member: str, expected: str, tmp_path: Path
) -> None:
    root = copied(name, tmp_path)
    space = " " * 4 * len(member.split("."))
    change(root, module, member, lambda block: f"{block.rstrip()}\n{space}changed = True\n\n")
    said = str(PATCHES[name].probe(root))
    assert said.startswith(f"the source of {module}.{member} has changed (sha256:")


@pytest.mark.parametrize(FOUR, expectations("call("), ids=short)
def test_a_changed_signature_is_noticed(
    name: str, module: str, member: str, expected: str, tmp_path: Path
) -> None:
    def edit(block: str) -> str:
        first = rf"(def {short(member)}\(\s*)(self|cls)?"
        return re.sub(first, lambda m: m[1] + (f"{m[2]}, new" if m[2] else "new, "), block, count=1)

    root = copied(name, tmp_path)
    change(root, module, member, edit)
    said = str(PATCHES[name].probe(root))
    assert f"{module}.{member} " in said
    assert "new" in said


@pytest.mark.parametrize(FOUR, expectations("names:"), ids=short)
def test_a_name_that_has_gone_is_noticed(
    name: str, module: str, member: str, expected: str, tmp_path: Path
) -> None:
    root = copied(name, tmp_path)
    for word in expected.removeprefix("names:").split():
        change(root, module, member, lambda block, word=word: re.sub(rf"\b{word}\b", "x", block))
    assert PATCHES[name].probe(root) is not None


@pytest.mark.parametrize("name", PATCHES)
def test_a_module_that_has_gone_is_noticed(name: str, tmp_path: Path) -> None:
    module = next(module for module in PATCHES[name].applies_to if module.startswith("vllm."))
    file_of(copied(name, tmp_path), module).unlink()
    assert "is not there any more" in str(PATCHES[name].probe(tmp_path))


FUNCTION = '''
class C:
    @decorated
    def f(self, a, b=1):
        """What it does."""
        # why
        return g(
            a,
        )  # because

    def g(self): ...
'''


@pytest.mark.parametrize(
    ("changed", "by", "is_same"),
    [
        ("# why", "# why, in other words", True),
        ('"""What it does."""', '"""What it does.\n\n        At length.\n        """', True),
        ("  # because", "", True),
        ("\n        return", "\n\n        return", True),
        ("return g(", "return h(", False),
        ("@decorated", "@otherwise", False),
        ("b=1", "b=2", False),
        ("def g(self)", "def h(self)", True),
    ],
)
def test_code_counts_and_words_do_not(changed: str, by: str, is_same: bool, tmp_path: Path) -> None:
    found = []
    for number, text in enumerate((FUNCTION, FUNCTION.replace(changed, by))):
        root = tmp_path / str(number)
        (root / "vllm").mkdir(parents=True)
        (root / "vllm/m.py").write_text(text)
        found.append(probing.digest(probing.source_of("vllm.m", "C.f", root)))
    assert (found[0] == found[1]) is is_same


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ("call(a)", None),
        ("call(a, b)", None),
        ("call(a, *, b, c)", None),
        ("call(a, *, b, d)", "takes_a does not take d any more"),
        ("call()", "takes_a wants a, which it did not"),
        ("call(b)", "the signature of vllm.m.takes_a has changed"),
    ],
)
def test_a_call_fits_as_long_as_what_is_new_has_a_default(
    call: str, said: str | None, tmp_path: Path
) -> None:
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm/m.py").write_text("def takes_a(a, b=1, *, c=2):\n    pass\n")
    found = probing.reason({"vllm.m": {"takes_a": call}}, tmp_path)
    assert (found is None) if said is None else said in str(found)


def test_asking_imports_neither_vllm_nor_torch() -> None:
    """It is asked before vLLM is imported, or of a version that could not be imported here."""
    code = (
        "import sys; from packhorse.serve.engines.vllm import patches\n"
        "assert not [name for name in patches.PATCHES if patches.reason(name)]\n"
        "sys.exit(2 * bool({'vllm', 'torch'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_tool_tells_what_does_not_fit_and_its_new_hash(tmp_path: Path) -> None:
    path = file_of(copied("fast_outputs", tmp_path), "vllm.v1.engine.output_processor")
    path.write_text(path.read_text().replace("self.aggregate = ", "self.aggregate = not "))
    command = [sys.executable, ROOT / "tools/probe_vllm.py", tmp_path]
    told = subprocess.run(command, capture_output=True, text=True)
    assert told.returncode == 1, told.stderr
    assert "RequestOutputCollector has changed (sha256:" in told.stdout


# What is left out, and what is served instead.


@pytest.mark.parametrize("name", SPEED)
def test_a_speed_patch_that_does_not_fit_is_left_out_with_one_warning(
    name: str, unfit: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    unfit(name)
    assert not patches.use(name)
    assert not patches.use(name)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert f"The patch {name} does not fit this vLLM and is left out: {REASON}. " in caplog.text
    assert PATCHES[name].without in caplog.text
    (row,) = (row for row in patches.table() if row.name == name)
    assert row == (name, "speed", f"left out: {REASON}")


def test_the_table_tells_what_is_applied_and_what_is_not_needed() -> None:
    assert patches.use("fast_outputs")
    assert not patches.use("avx2_int4", needed=False)
    states = {row.name: row.state for row in patches.table()}
    assert states.keys() == PATCHES.keys()
    assert (states["fast_outputs"], states["avx2_int4"]) == ("applied", "not needed here")
    assert "fast_outputs (speed): applied; " in patches.summary()
    assert "\n" not in patches.summary()


def test_a_patch_that_an_engine_uses_stays_in_the_table() -> None:
    """Whatever another engine of this process needs."""
    patches.use("lora_time_slicing")
    patches.use("lora_time_slicing", needed=False)
    assert patches._states["lora_time_slicing"] == "applied"


def test_without_the_forkserver_vllm_starts_its_processes_itself(
    unfit: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forkserver, "is_cpu_build", lambda: True)
    unfit("forkserver")

    def never() -> None:
        raise AssertionError("it was started")

    monkeypatch.setattr(forkserver.forkserver, "ensure_running", never)
    usual = utils.get_mp_context
    with forkserver.engines_are_forked():
        assert utils.get_mp_context is usual


def test_with_the_forkserver_it_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forkserver, "is_cpu_build", lambda: True)
    monkeypatch.setattr(forkserver.forkserver, "ensure_running", lambda: None)
    usual = utils.get_mp_context
    with forkserver.engines_are_forked():
        assert utils.get_mp_context is forkserver._Context
    assert utils.get_mp_context is usual


def test_without_its_executor_and_bound_the_arguments_are_vllms(
    unfit: Callable[..., None], tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arguments.current_platform, "is_cpu", lambda: True)
    args = engine_args(tiny_checkpoint, "m", settings())
    assert args.distributed_executor_backend == EXECUTOR
    assert args.additional_config
    unfit("in_process_executor", "json_whitespace")
    args = engine_args(tiny_checkpoint, "m", settings())
    assert args.distributed_executor_backend is None
    assert not args.additional_config


def test_the_worker_is_ours_while_a_patch_in_it_fits(
    unfit: Callable[..., None], tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arguments.current_platform, "is_cpu", lambda: True)
    unfit("amx")
    assert engine_args(tiny_checkpoint, "m", settings()).worker_cls == WORKER
    unfit("cpu_lora_math")
    assert engine_args(tiny_checkpoint, "m", settings()).worker_cls != WORKER


def test_without_time_slicing_there_are_as_many_adapters_as_slots(
    unfit: Callable[..., None], tiny_checkpoint: Path
) -> None:
    asked = settings(enable_lora=True, max_loras=4, lora_oversubscription=2)
    assert max_active_loras(asked) == 8
    assert engine_args(tiny_checkpoint, "m", asked).scheduler_cls == SCHEDULER
    unfit("lora_time_slicing")
    assert max_active_loras(asked) == 4
    assert engine_args(tiny_checkpoint, "m", asked).scheduler_cls != SCHEDULER


@pytest.mark.parametrize("names", [(), ("json_whitespace",), ("avx2_int4",)])
def test_the_plugin_installs_what_fits(
    names: tuple[str, ...], unfit: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = []
    for name in ("json_whitespace", "avx2_int4"):
        module: Any = importlib.import_module(f"packhorse.serve.engines.vllm.patches.{name}")
        monkeypatch.setattr(module, "install", lambda name=name: installed.append(name))
    unfit(*names)
    plugin.register()
    assert set(installed) == {"json_whitespace", "avx2_int4"} - set(names)


@pytest.mark.parametrize("names", [(), ("cpu_lora_math",), ("amx",)])
def test_the_worker_installs_what_fits(
    names: tuple[str, ...], unfit: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    from packhorse.serve.engines.vllm.patches import amx, cpu_lora_math, cpu_worker

    installed: list[str] = []
    for module in (amx, cpu_lora_math):
        name = module.NAME
        monkeypatch.setattr(module, "install", lambda name=name: installed.append(name))
    monkeypatch.setattr(cpu_worker, "die_with_parent", lambda: None)
    monkeypatch.setattr(cpu_worker.CPUWorker, "init_device", lambda self: None)
    unfit(*names)
    cpu_worker.PatchedCPUWorker.init_device(object.__new__(cpu_worker.PatchedCPUWorker))
    assert set(installed) == {"cpu_lora_math", "amx"} - set(names)


# What is refused.


@pytest.fixture
def _cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arguments.current_platform, "is_cpu", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)


@pytest.mark.usefixtures("_cpu")
def test_without_its_lora_product_adapters_are_refused(unfit: Callable[..., None]) -> None:
    refuse_unpatched(settings(enable_lora=True))
    unfit("cpu_lora_math")
    with pytest.raises(StartupError) as caught:
        refuse_unpatched(settings(enable_lora=True))
    said = str(caught.value)
    assert "Serving adapters on a CPU needs the patch cpu_lora_math, which does not fit" in said
    assert REASON in said
    assert "Serve without adapters" in said, "the way out"
    refuse_unpatched(settings())
    (row,) = (row for row in patches.table() if row.name == "cpu_lora_math")
    assert row.state == f"left out: {REASON}"


@pytest.mark.usefixtures("_cpu")
def test_on_a_gpu_adapters_do_not_need_it(
    unfit: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arguments.current_platform, "is_cpu", lambda: False)
    unfit("cpu_lora_math", "amx")
    refuse_unpatched(settings(enable_lora=True))


@pytest.mark.usefixtures("_cpu")
def test_without_its_call_for_amx_an_engine_is_refused_where_there_is_amx(
    unfit: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    unfit("amx")
    refuse_unpatched(settings())
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    with pytest.raises(StartupError, match=r"which has AMX, needs the patch amx, .* Install the"):
        refuse_unpatched(settings())


@pytest.mark.usefixtures("_cpu")
def test_without_its_kernel_4_bit_weights_are_refused_where_vllm_has_none(
    unfit: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = {"dtype": "bfloat16", "quantization_config": {"quant_method": "gptq", "bits": 4}}
    (tmp_path / "config.json").write_text(json.dumps(packed))
    unfit("avx2_int4")
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: True)
    refuse_what_would_crash(tmp_path, settings())
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: False)
    with pytest.raises(StartupError, match=r"without AVX-512 needs the patch avx2_int4.*int8"):
        refuse_what_would_crash(tmp_path, settings())


def test_correctness_patches_are_those_that_something_is_refused_without() -> None:
    assert set(CORRECTNESS) == {"cpu_lora_math", "amx", "avx2_int4"}


# Who may reach into vLLM.


@pytest.mark.parametrize(
    "path", sorted((ROOT / "serve/engines/vllm").glob("*.py")), ids=lambda path: path.stem
)
def test_outside_of_patches_vllms_api_is_public(path: Path) -> None:
    """No name of vLLM's with an underscore, and none of AsyncLLM's inner parts."""
    text = path.read_text(encoding="utf-8")
    imported = re.findall(r"^from vllm\S* import (?:\(([^)]*)\)|(.*))$", text, re.MULTILINE)
    names = re.findall(r"\w+", " ".join(" ".join(each) for each in imported))
    assert not [name for name in names if name.startswith("_")]
    inner = r"\bllm\.(_|engine_core|output_processor|input_processor|logger_manager)"
    assert re.search(inner, text) is None


def test_several_workers_are_not_in_the_engine_cores_process() -> None:
    from packhorse.serve.engines.vllm.patches import in_process_executor

    assert not in_process_executor.is_possible({"tensor_parallel_size": 2})
