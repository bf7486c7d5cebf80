"""What every module of the package may import: layers, and engines and TRL in few places only."""

import ast
import sys
from pathlib import Path

import pytest

import ogpsa_trl

PACKAGE = "ogpsa_trl"
ROOT = Path(ogpsa_trl.__file__).parent

# Per module what it may import: modules of the package, all from rows above, and packages. The
# standard library and imports for type checking only are free; `torch` does not include
# `torch.distributed`. A new module needs a row.
LAYERS = {
    "config": ("", ""),
    "tensors.__init__": ("", ""),
    "tensors.matrices": ("", "torch"),
    "tensors.vectors": ("tensors.matrices", "torch"),
    "tensors.constraints": ("", "torch"),
    "tensors.divergence": ("", "torch"),
    "tensors.tiled_head": ("", "torch"),
    "optimizers": ("", "torch"),
    "backends": ("config optimizers", "torch torch.distributed accelerate"),
    "zero": ("backends", "torch torch.distributed accelerate deepspeed"),
    "engines": ("config backends zero", "torch torch.distributed accelerate"),
    "values": ("", ""),
    "columns": ("", "datasets trl"),
    "row_values": ("columns values", "jinja2"),
    "rows": ("columns row_values", "datasets"),
    "rendering": ("columns row_values rows", "datasets transformers trl"),
    "data": ("columns rows rendering", "pyarrow torch datasets trl"),
    "group_warnings": ("data", "datasets"),
    "gradients": ("tensors.vectors backends data", "torch"),
    "start": ("backends data gradients", "torch"),
    "subspace": ("tensors.matrices tensors.vectors optimizers backends config gradients", "torch"),
    "capability_loss": (
        "backends config data tensors.divergence gradients start tensors.tiled_head",
        "torch",
    ),
    "projection": (
        "tensors.matrices tensors.vectors tensors.constraints backends subspace",
        "torch",
    ),
    "diagnostics": ("gradients projection subspace", "torch"),
    "completeness": ("", "transformers safetensors"),
    "checkpoint": ("backends completeness config data start subspace", "torch safetensors"),
    "callback": ("config subspace", "transformers"),
    "model_card": ("config data", ""),
    "model_kind": ("", "transformers"),
    "trackers": ("config data", "transformers wandb trackio"),
    "mixin": (
        "config backends engines data group_warnings gradients start tensors.tiled_head "
        "capability_loss "
        "subspace projection completeness checkpoint diagnostics callback model_card model_kind "
        "trackers",
        "torch datasets transformers trl tqdm",
    ),
    "trainers": ("rendering data mixin", "torch trl"),
    "gate": (
        "backends checkpoint config data engines gradients start trackers mixin",
        "torch datasets transformers",
    ),
    "__init__": ("config callback mixin trainers gate", ""),
    "conversions": ("", "datasets"),
    "mixture": ("conversions", "datasets trl"),
    "shipped": ("", ""),
    "ranges": ("values", ""),
    "yaml_file": ("values", "yaml"),
    "renamed_keys": ("", ""),
    "parsing": ("renamed_keys shipped values yaml_file", "trl"),
    "arguments": ("config mixture", "datasets trl"),
    "checks": ("arguments config mixture", "trl"),
    "command_line": (
        "config mixture values ranges parsing arguments checks",
        "transformers trl",
    ),
    "paths": ("", "transformers"),
    "formats": ("columns rows rendering mixture", "datasets"),
    "user_errors": ("completeness row_values", "jinja2 safetensors transformers"),
    "launch": ("command_line parsing shipped", "yaml accelerate torch.distributed"),
    "cli": ("__init__ launch shipped user_errors values", ""),
    "toy": ("", "datasets"),
    "toy_model": ("toy", "torch tokenizers transformers"),
    "toy_pretrain": ("toy toy_model", "torch transformers tqdm"),
    "evaluation.measures": ("", "torch transformers trl"),
    "evaluation.tradeoff": ("", "matplotlib"),
    "evaluation.intervals": ("", "numpy scipy"),
    "evaluation.results": ("evaluation.intervals", ""),
    "evaluation.report": ("", "matplotlib"),
    "evaluation.generation": ("evaluation.measures", "torch transformers"),
    "evaluation.refusal": ("", ""),
    "evaluation.capability": (
        "data evaluation.intervals evaluation.measures",
        "torch datasets transformers",
    ),
    "evaluation.harness": (
        "evaluation.intervals evaluation.results evaluation.generation",
        "numpy torch transformers lm_eval",
    ),
    "evaluation.arguments": (
        "mixture parsing ranges evaluation.harness evaluation.refusal",
        "trl",
    ),
    "evaluation.sets": (
        "columns row_values rows rendering data formats mixture evaluation.arguments "
        "evaluation.measures",
        "torch datasets transformers trl",
    ),
    "evaluation.suite": (
        "evaluation.intervals evaluation.results evaluation.measures evaluation.generation "
        "evaluation.refusal evaluation.capability evaluation.harness evaluation.arguments "
        "evaluation.sets",
        "numpy transformers",
    ),
    "evaluation.__init__": ("evaluation.measures evaluation.tradeoff evaluation.report", ""),
    "run_report.log": ("", ""),
    "run_report.settings": ("gate mixin run_report.log", "transformers"),
    "run_report.charts": ("run_report.log", "matplotlib"),
    "run_report.contents": ("run_report.charts run_report.log", ""),
    "run_report.page": (
        "evaluation.report evaluation.results run_report.charts run_report.contents run_report.log",
        "jinja2",
    ),
    "run_report.__init__": ("run_report.page run_report.settings", ""),
    "capability_set.__init__": ("", ""),
    "capability_set.arguments": ("mixture parsing ranges evaluation.arguments", "trl"),
    "capability_set.rows": (
        "columns row_values rows rendering mixture evaluation.generation evaluation.measures "
        "evaluation.refusal capability_set.arguments",
        "torch datasets transformers trl",
    ),
    "capability_set.measures": (
        "tensors.matrices tensors.vectors engines data gradients evaluation.capability "
        "capability_set.arguments capability_set.rows",
        "torch datasets transformers",
    ),
    "capability_set.checks": (
        "capability_set.arguments capability_set.rows capability_set.measures",
        "",
    ),
    "capability_set.report": (
        "evaluation.report capability_set.rows capability_set.measures",
        "",
    ),
}

ENGINES = {"accelerate", "deepspeed", "torch.distributed"}
TRAINING_LIBRARIES = {"trl", "transformers"}

FILES = {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in ROOT.rglob("*.py")}


def is_type_checking(node):
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def nodes_at_run_time(tree):
    """All nodes, in functions too, but not those under `if TYPE_CHECKING`."""
    for node in ast.iter_child_nodes(tree):
        if is_type_checking(node):
            yield from (n for child in node.orelse for n in (child, *nodes_at_run_time(child)))
        else:
            yield node
            yield from nodes_at_run_time(node)


def imported_names(tree):
    """Dotted names that a module imports; an imported name counts as a part of its module."""
    for node in nodes_at_run_time(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}: write {PACKAGE}.module"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed":
            yield "torch.distributed"  # reachable without an import of its own


def module_of(name):
    """The module of the package that a dotted name lies in."""
    path = name.removeprefix(PACKAGE).removeprefix(".")
    while path:
        for module in (path, f"{path}.__init__"):
            if module in FILES:
                return module
        path = path.rpartition(".")[0]
    return "__init__"


def package_of(name):
    distributed = name == "torch.distributed" or name.startswith("torch.distributed.")
    return "torch.distributed" if distributed else name.partition(".")[0]


def imports(source):
    """What a source file imports, the standard library aside: modules of the package, packages."""
    names = set(imported_names(ast.parse(source)))
    packages = {package_of(name) for name in names} - set(sys.stdlib_module_names)
    ours = {module_of(name) for name in names if package_of(name) == PACKAGE}
    return ours, packages - {PACKAGE}


IMPORTS = {module: imports(path.read_text("utf-8")) for module, path in FILES.items()}


def test_every_module_has_a_row_and_every_row_a_module():
    assert set(LAYERS) == set(FILES)


@pytest.mark.parametrize("module", LAYERS)
def test_a_module_imports_what_its_row_allows(module):
    modules, packages = IMPORTS[module]
    allowed_modules, allowed_packages = (set(names.split()) for names in LAYERS[module])
    assert modules <= allowed_modules
    assert packages <= allowed_packages


def test_every_row_names_rows_above_only():
    above = set()
    for module, (allowed, _) in LAYERS.items():
        assert set(allowed.split()) <= above, module
        above.add(module)


def test_engines_are_known_to_the_backends_and_the_launcher_only():
    users = {module for module, (_, packages) in IMPORTS.items() if packages & ENGINES}
    assert users <= {"backends", "zero", "engines", "launch"}


def test_training_libraries_stay_where_training_is():
    users = {module for module, (_, packages) in IMPORTS.items() if packages & TRAINING_LIBRARIES}
    elsewhere = {m for m in users if not m.startswith(("toy", "evaluation.", "capability_set."))}
    assert elsewhere <= {
        "columns", "rendering", "data", "callback", "completeness", "trackers", "mixin",
        "trainers", "gate", "mixture", "parsing", "checks", "arguments", "command_line", "paths",
        "formats", "model_kind",
        "user_errors", "run_report.settings",
    }  # fmt: skip


def test_nothing_imports_the_scripts():
    scripts = {path.stem for path in (ROOT.parent / "scripts").glob("*.py")} | {"scripts"}
    for module, (_, packages) in IMPORTS.items():
        assert packages.isdisjoint(scripts), module


@pytest.mark.parametrize("module", FILES)
def test_the_package_does_not_print(module):
    """Messages are logged; the reader of a log decides where they go."""
    calls = (
        n for n in ast.walk(ast.parse(FILES[module].read_text("utf-8"))) if type(n) is ast.Call
    )
    assert not [call.lineno for call in calls if ast.unparse(call.func) == "print"]


def test_the_reader_of_imports_sees_every_form():
    """The tests above are worth as much as what they see."""
    source = """
import os.path, torch
import torch.distributed.tensor as t
from typing import TYPE_CHECKING
from ogpsa_trl import OGPSAConfig
from ogpsa_trl.tensors import matrices
from ogpsa_trl.data import Part
from ogpsa_trl.evaluation import markdown_table
if TYPE_CHECKING:
    from ogpsa_trl.trainers import OGPSAMixin
else:
    import yaml
def lazily():
    try:
        import deepspeed
    except ImportError:
        from trl import SFTTrainer
"""
    assert imports(source) == (
        {"tensors.matrices", "__init__", "data", "evaluation.__init__"},
        {"torch", "torch.distributed", "yaml", "deepspeed", "trl"},
    )
    assert imports("import torch\ntorch.distributed.barrier()")[1] == {"torch", "torch.distributed"}
    assert imports("from torch import distributed")[1] == {"torch.distributed"}
    assert imports("import accelerate.utils as a")[1] == {"accelerate"}
