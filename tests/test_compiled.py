"""What a compiled program consists of, and the command line that shows it."""

import importlib.metadata
import json
import re

import jax
import jax.numpy as jnp
import optax
import pytest

from benchmarks import __main__ as command_line
from benchmarks import compiler, hlo, rows, targets

MIB = 2**20

# A GPU: a kernel, a copy, a loop of one kernel and a choice between two and none.
GPU = """
HloModule jit_update, is_scheduled=true, entry_computation_layout={(f32[])->f32[]}

%region_0.1 (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b), metadata={op_name="jit(f)/while(x) = y"}
}

%fused (p.1: f32[512,512]) -> f32[] {
  %p.1 = f32[512,512]{1,0} parameter(0)
  %zero = f32[] constant(0)
  ROOT %reduce.1 = f32[] reduce(%p.1, %zero), dimensions={0,1}, to_apply=%region_0.1
}

%body (carry: (f32[512,512], f32[])) -> (f32[512,512], f32[]) {
  %carry = (f32[512,512]{1,0}, f32[]) parameter(0)
  %read = f32[512,512]{1,0} get-tuple-element(%carry), index=0
  %fusion.3 = f32[] fusion(%read), kind=kInput, calls=%fused
  ROOT %next = (f32[512,512]{1,0}, f32[]) tuple(%read, %fusion.3)
}

%condition (carry.1: (f32[512,512], f32[])) -> pred[] {
  %carry.1 = (f32[512,512]{1,0}, f32[]) parameter(0)
  ROOT %true = pred[] constant(true)
}

%dear (x: f32[512,512]) -> f32[512,512] {
  %x = f32[512,512]{1,0} parameter(0)
  %fusion.4 = f32[512,512]{1,0} fusion(%x), kind=kLoop, calls=%fused
  ROOT %fusion.5 = f32[512,512]{1,0} fusion(%fusion.4), kind=kLoop, calls=%fused
}

%cheap (x.1: f32[512,512]) -> f32[512,512] {
  ROOT %x.1 = f32[512,512]{1,0} parameter(0)
}

ENTRY %main (p: f32[512,512], q: f32[]) -> (f32[512,512], f32[]) {
  %p = f32[512,512]{1,0} parameter(0)
  %q = f32[] parameter(1)
  %copy.1 = f32[512,512]{1,0} copy(%p)
  %start = (f32[512,512]{1,0}, /*index=1*/f32[]) tuple(%copy.1, %q)
  %while.1 = (f32[512,512]{1,0}, f32[]) while(%start), condition=%condition, body=%body
  %kept = f32[512,512]{1,0} get-tuple-element(%while.1), index=0
  %which = s32[] get-tuple-element(%while.1), index=1
  %chosen = f32[512,512]{1,0} conditional(%which, %kept, %kept), CHOICE
  ROOT %result = (f32[512,512]{1,0}, f32[]) tuple(%chosen, %q)
}
"""
CHOICES = [
    "branch_computations={%dear, %cheap}",
    "true_computation=%cheap, false_computation=%dear",
]

# A TPU: T(8,128) are tiles, S(1) is vector memory, S(2) what one waits for.
TPU = """
HloModule jit_update, is_scheduled=true

%fused (p.1: f32[64,32]) -> f32[64,32] {
  ROOT %p.1 = f32[64,32]{1,0:T(8,128)} parameter(0)
}

ENTRY %main.1 (u: f32[64,32]) -> f32[64,32] {
  %u = f32[64,32]{1,0:T(8,128)} parameter(0)
  %copy-start = (f32[64,32]{1,0:T(8,128)S(1)}, f32[64,32]{1,0:T(8,128)}, u32[]{:S(2)}) \
copy-start(%u), backend_config={"dma_priority":1}
  %copy-done = f32[64,32]{1,0:T(8,128)S(1)} copy-done(%copy-start)
  %fusion = f32[64,32]{1,0:T(8,128)S(1)} fusion(%copy-done), kind=kLoop, \
calls=%fused, backend_config={"window_config":{"estimated_cycles":"1825"}}
  ROOT %fusion.1 = f32[64,32]{1,0:T(8,128)} fusion(f32[64,32]{1,0:T(8,128)S(1)} \
%fusion), kind=kLoop, calls=%fused, backend_config={"estimated_cycles":"75"}
}
"""

SPLIT = """
HloModule jit_update, num_partitions=4

%scatter (s: f32[8]) -> f32[2] {
  %s = f32[8]{0} parameter(0)
  ROOT %reduce-scatter = f32[2]{0} reduce-scatter(%s), dimensions={0}
}

%branch (v: f32[8]) -> f32[8] {
  %v = f32[8]{0} parameter(0)
  ROOT %all-reduce = f32[8]{0} all-reduce(%v), channel_id=1, to_apply=%add
}

%nothing (n: f32[8]) -> f32[8] {
  ROOT %n = f32[8]{0} parameter(0)
}

ENTRY %main (u: f32[8], i: s32[]) -> f32[8] {
  %u = f32[8]{0} parameter(0)
  %i = s32[] parameter(1)
  %began = ((f32[8]{0}), f32[2]{0}) reduce-scatter-start(%u), calls=%scatter
  %reduce-scatter-done = f32[2]{0} reduce-scatter-done(%began)
  %all-gather = f32[8]{0} all-gather(%reduce-scatter-done), dimensions={0}
  ROOT %c = f32[8]{0} conditional(%i, %all-gather, %u), \
branch_computations={%nothing, %branch}
}
"""


@pytest.fixture(autouse=True)
def settings():
    """Whoever compiles for others sets JAX up for a process of its own."""
    jax.devices()  # what there is has started: it stays
    names = "jax_platforms", "jax_enable_compilation_cache"
    before = {name: jax.config.values[name] for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.mark.parametrize("choice", CHOICES)
def test_a_loop_counts_once_and_of_a_conditional_the_cheapest_branch(choice):
    counts = hlo.count(hlo.parse(GPU.replace("CHOICE", choice)))
    assert counts == hlo.Counts(
        kernels=2, copies=1, loops=1, conditionals=1, nbytes=3 * MIB + 4
    )


def test_each_computation_can_be_counted_by_itself():
    program = hlo.parse(GPU.replace("CHOICE", CHOICES[0]))
    assert program.entry == "main"
    assert hlo.count(program, "dear") == hlo.Counts(kernels=2, nbytes=4 * MIB)
    assert hlo.count(program, "cheap") == hlo.Counts()


def test_an_instruction_has_its_operands_and_not_what_it_calls():
    program = hlo.parse(GPU.replace("CHOICE", CHOICES[0]))
    (found,) = [i for i in program.computations["main"] if i.opcode == "while"]
    assert found.name == "while.1"
    assert found.operands == ("start",)
    assert found.called("body") == ["body"]
    assert found.called("body", "condition") == ["condition", "body"]


def test_on_a_tpu_only_main_memory_counts_and_transfers_once():
    counts = hlo.count(hlo.parse(TPU))
    assert counts == hlo.Counts(kernels=2, copies=1, nbytes=2 * 4 * 64 * 32)
    assert hlo.cycles(TPU) == 1900
    assert hlo.cycles(GPU) == 0


def test_collectives_count_in_every_branch_and_once_if_started():
    program = hlo.parse(SPLIT)
    counted = {"all-gather": 1, "all-reduce": 1, "reduce-scatter": 1}
    assert hlo.collectives(program) == counted
    assert hlo.count(program).kernels == 2  # the branch that reduces is not taken


def test_a_called_computation_is_counted_in_place():
    called = """
%work (x: f32[4]) -> f32[4] {
  %x = f32[4]{0} parameter(0)
  ROOT %y = f32[4]{0} negate(%x)
}

ENTRY %main (u: f32[4]) -> f32[4] {
  %u = f32[4]{0} parameter(0)
  %begun = ((f32[4]{0}), f32[4]{0}) async-start(%u), calls=%work
  %ended = f32[4]{0} async-done(%begun)
  ROOT %z = f32[4]{0} call(%ended), to_apply=%work
}
"""
    assert hlo.count(hlo.parse(called)) == hlo.Counts(kernels=2, nbytes=64)


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ("f32[]", 4),
        ("f32[64,32]{1,0:T(8,128)}", 8192),
        ("f32[64,32]{1,0:T(8,128)S(1)}", 0),
        ("(bf16[3]{0}, pred[5]{0}, /*index=2*/u32[]{:S(2)})", 11),
        ("s4[3]{0}", 2),
        ("f8e4m3fn[7]{0}", 7),
        ("token[]", 0),
        ("f32[0,4]{1,0}", 0),
    ],
)
def test_bytes_of_a_shape(shape, size):
    assert hlo.nbytes(shape) == size


def test_text_without_an_entry_is_refused():
    with pytest.raises(ValueError, match="ENTRY"):
        hlo.parse("HloModule empty\n")


def test_a_program_for_the_cpu_is_read():
    leaves = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((64, 32), (32,), (32, 8))]
    size = 4 * (64 * 32 + 32 + 32 * 8)
    tx = optax.clip_by_global_norm(1.0)
    lowered = jax.jit(lambda u: tx.update(u, optax.EmptyState())[0]).lower(leaves)
    text = lowered.compile().as_text()
    counts = hlo.count(hlo.parse(text))
    assert counts.kernels >= len(leaves)  # each is written
    assert counts.loops == counts.conditionals == 0
    assert counts.nbytes >= 3 * size  # read, and read and written
    assert hlo.collectives(hlo.parse(text)) == {}


def test_split_leaves_are_reduced_over_the_devices():
    devices = targets.devices("cpu", targets.COUNT)
    place = compiler.placement(devices)
    name = "optax clip_by_global_norm"
    (made,) = compiler.compile_rows([name], 5, place)
    assert set(made.collectives) == {"all-reduce"}
    (alone,) = compiler.compile_rows([name], 5, compiler.placement(devices[:1]))
    assert alone.collectives == {}


def test_models_have_as_many_leaves_as_asked_for():
    assert all(len(rows.model(n)) == n for n in (1, 2, 12, 13, 30, 148))
    sizes = {n: sum(jnp.prod(jnp.array(s)) for s in rows.model(n)) for n in (13, 148)}
    assert sizes[148] - sizes[13] == 25 * 768  # biases of the normalizations


def test_every_row_is_compared_with_a_row_of_optax_before_it():
    order = list(rows.ROWS)
    for name, row in rows.ROWS.items():
        if row.peer:
            assert row.peer.startswith("optax ")
            assert order.index(row.peer) < order.index(name)


def test_compile_for_the_cpu_writes_a_table_programs_and_json(tmp_path, capsys):
    out, programs = tmp_path / "rows.json", tmp_path / "hlo"
    command = ["compile", "--for", "cpu", "--leaves", "3", "5", "--adam"]
    command += ["--only", "optax clip_by_global_norm", "--json", str(out)]
    assert command_line.main([*command, "--dump", str(programs)]) == 0
    shown = capsys.readouterr().out
    assert "what the compiler makes of it; nothing was run" in shown
    assert "5 leaves" in shown and "Adam behind" in shown
    assert "cycles" not in shown  # the compiler for CPUs does not guess
    report = json.loads(out.read_text())
    assert report["machine"]["jax"] == jax.__version__
    assert {"jaxlib", "optax", "started"} <= set(report["machine"])
    assert (report["target"], report["adam"], report["split"]) == ("cpu", True, False)
    assert [row["leaves"] for row in report["rows"]] == [3, 5]
    for row in report["rows"]:
        assert row["name"] == "optax clip_by_global_norm"
        assert row["kernels"] > 0 and row["cycles"] is None
        assert row["passes"] >= 6
    texts = sorted(programs.iterdir())
    assert len(texts) == 2
    assert all(hlo.parse(text.read_text()).entry for text in texts)


def test_ratios_are_those_to_the_row_of_optax():
    def made(name, kernels, cycles):
        return compiler.Compiled(
            leaves=1,
            name=name,
            kernels=kernels,
            copies=0,
            loops=0,
            conditionals=0,
            passes=1.0,
            temp=0.0,
            trace_seconds=0.1,
            compile_seconds=0.5,
            cycles=cycles,
            collectives={},
            text="",
        )

    beside = made("ours", 13, None).beside(made("optax theirs", 26, None))
    assert beside.ratios == {"kernels": 0.5, "compile_seconds": 1.0}
    assert beside.as_row()["peer"] == "optax theirs"
    beside = made("ours", 13, 30).beside(made("optax theirs", 26, 20))
    assert beside.ratios["cycles"] == 1.5


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--leaves", "0"], "--leaves: must be >= 1, got 0"),
        (["--leaves", "many"], "invalid int value: 'many'"),
        (["--only", "no_such_clip"], "no row has 'no_such_clip' in its name"),
        (["--json", "no/such/directory/rows.json"], "--json: cannot write"),
        (["--dump", __file__], "is no directory"),
        (["--for", "z80"], "invalid choice: 'z80'"),
    ],
)
def test_an_option_that_is_wrong_ends_with_one_line_and_code_2(options, said, capsys):
    with pytest.raises(SystemExit) as error:
        command_line.main(["compile", "--for", "cpu", *options])
    assert error.value.code == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("target", "wanted"),
    [("h100", "pip install --no-deps jax-cuda12-plugin=="), ("v5e", "jax[tpu]==")],
)
def test_a_missing_compiler_ends_with_one_line_and_code_2(
    target, wanted, capsys, monkeypatch
):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    with pytest.raises(SystemExit) as error:
        command_line.main(["compile", "--for", target])
    assert error.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(rf"python -m benchmarks compile: error: --for {target}: ", line)
    assert wanted in line
