"""maxlm compile: what the TPU compiler says of a step, and what lies in memory at its peak."""

import json

import pytest
from helpers import program_on, small_config

from maxlm.bench import without_room
from maxlm.buffer_parts import by_part
from maxlm.buffers import Buffer, at_peak
from maxlm.cli import main
from maxlm.hardware import detect
from maxlm.plan.targets import target
from maxlm.topology import topology_devices

MODEL = "vocab_size=512 num_layers=2 d_model=128 d_ff=256 num_heads=4".split()
SETTINGS = [f"model.{field}" for field in MODEL] + ["train.seq_len=128", "train.batch_size=8", "mesh.tensor=2"]

# A loop that fills a stack in place, beside something that it works with and something in fast memory.
PROGRAM = """HloModule jit__step, is_scheduled=true, input_output_alias={ {0}: (0, {}, may-alias) }

%body (p: CARRY) -> CARRY {
  %p = CARRY parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %x = ROWS get-tuple-element(%p), index=1
  %stack = STACK get-tuple-element(%p), index=2
  %work = f32[16,128]{1,0:T(8,128)} fusion(%x), kind=kLoop, metadata={op_name="jit(_step)/jvp()/mlp/mul"}
  %fast = f32[64,128]{1,0:T(8,128)S(1)} fusion(%work), kind=kLoop, metadata={op_name="jit(_step)/jvp()/mlp/add"}
  %next = ROWS fusion(%fast), kind=kLoop, metadata={op_name="jit(_step)/jvp()/mlp/sub"}
  %kept = STACK fusion(%stack, %next), kind=kLoop, metadata={op_name="jit(_step)/jvp()/norm/mul"}, IN_PLACE
  ROOT %out = CARRY tuple(%i, %next, %kept)
}

%condition (q: CARRY) -> pred[] {
  %q = CARRY parameter(0)
  ROOT %less = pred[]{:T(512)} constant(true)
}

ENTRY %main (a: f32[8,128], b: bf16[3,100]) -> (f32[8,128]) {
  %a = ROWS parameter(0)
  %b = bf16[3,100]{1,0:T(8,128)(2,1)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  %before = ROWS copy(%a), metadata={op_name="jit(_step)/embedding/copy"}
  %room = STACK custom-call(), custom_call_target="AllocateBuffer", metadata={op_name="broadcast.8"}
  %in = CARRY tuple(%zero, %before, %room)
  %loop = CARRY while(%in), condition=%condition, body=%body
  %last = ROWS get-tuple-element(%loop), index=1
  %small = bf16[3,100]{1,0:T(8,128)(2,1)} fusion(%b), kind=kLoop, metadata={op_name="jit(_step)/optimizer/mul"}
  %new = ROWS fusion(%last, %small), kind=kLoop, metadata={op_name="jit(_step)/optimizer/add"}
  ROOT %end = (ROWS) tuple(%new)
}
"""
for short, text in {
    "CARRY": "(s32[]{:T(128)}, ROWS, STACK)",
    "ROWS": "f32[8,128]{1,0:T(8,128)}",
    "STACK": "f32[4,8,128]{2,1,0:T(8,128)}",
    "IN_PLACE": 'backend_config={"aliasing_operands":{"lists":[{"indices":["0","2"]}]}}',
}.items():
    PROGRAM = PROGRAM.replace(short, text)


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(f"data: {{stores: [{{path: {tmp_path}/none}}]}}\ntrain: {{steps: 1, batch_size: 1, seq_len: 1}}\n")
    return str(path)


def test_buffers_at_the_peak_are_those_that_are_there_together():
    found = {buffer.array: buffer for buffer in at_peak(PROGRAM)}
    assert found.keys() == {"f32[4,8,128]", "f32[16,128]", "f32[8,128]"}, "neither arguments nor fast memory"
    stack, work, carried = (found[name] for name in ("f32[4,8,128]", "f32[16,128]", "f32[8,128]"))
    assert (stack.bytes, work.bytes, carried.bytes) == (4 * 8 * 128 * 4, 16 * 128 * 4, 8 * 128 * 4)
    assert stack.first < work.first < work.last < stack.last and "norm" in stack.source, "who writes into it"
    late = at_peak(PROGRAM.replace("bf16[3,100]", "bf16[3000,100]"))
    assert (late[0].array, late[0].bytes) == ("bf16[3000,100]", 3000 * 128 * 2), "rows of 128 are whole tiles"
    with pytest.raises(ValueError, match="not the text of a compiled program"):
        at_peak("no program")


def test_what_buffers_are_for_is_told_by_their_shapes():
    program = program_on(small_config(train={"grad_accum": 2}), fsdp=2, tensor=2)  # rows of a device: 2, of 12 tokens
    given = {
        "gradients": ["f32[3,10,14]", "f32[3,14,10]", "f32[20,14]", "f32[3,10,3,10]"],  # resting; turned; whole; Q
        "gathered": ["bf16[1,20,14]", "bf16[3,20,3,10]"],
        "activations": ["bf16[3,2,12,20]", "f32[3,2,3,12]", "bf16[3,1,2,12,14]"],
        "mlp": ["bf16[2,12,14]", "bf16[2,2,12,14]", "f32[14]", "f32[3,2,11,20]"],
    }
    source = "jit(_step)/jvp()/while/body/mlp/BTD,DF->BTF/dot_general"
    found = [Buffer(array, 8, source, 0, 1) for arrays in given.values() for array in arrays]
    result = by_part(found, program, top=2)
    assert result["buffers_by_part"] == {part: 8 * len(arrays) for part, arrays in given.items()}
    assert result["buffers_bytes"] == 8 * len(found) and len(result["buffers"]) == 2
    backward = Buffer("bf16[20,14]", 8, source.replace("jvp()", "transpose(jvp())"), 0, 1)
    assert by_part([backward], program, 1)["buffers_by_part"] == {"gradients": 8}
    copied = Buffer("bf16[7,5]", 8, "jit(_step)/jvp()/while/body/dynamic_update_slice", 0, 1)
    assert by_part([copied], program, 1)["buffers_by_part"] == {"activations": 8}, "such as a pipeline's"
    rounds = program_on(small_config(model={"num_layers": 4}, train={"grad_accum": 2}), stage=2, rounds=2, fsdp=2)
    of_rounds = [Buffer(array, 8, source, 0, 1) for array in ("f32[2,1,20,28]", "bf16[1,2,20,28]")]
    assert by_part(of_rounds, rounds, 1)["buffers_by_part"] == {"gradients": 8, "gathered": 8}


@pytest.mark.tpu
@pytest.mark.xdist_group("tpu")
def test_compiles_for_a_slice_that_is_not_there(config, capsys, tmp_path):
    text = tmp_path / "step.txt"
    assert main(["compile", config, *SETTINGS, "--on", "v5e:2x2", "--top", "50", "--hlo", str(text), "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["device_kind"] == "TPU v5 lite"
    assert result["hbm_bytes"] == 16 * 2**30
    assert result["step_time_s"] == pytest.approx(result["cycles"] / 1.503e9, rel=1e-3), "2**17 FLOPs a cycle"
    assert 0 < result["share_of_roofline"] == result["mfu"] < 1
    assert result["kernel_flops"] > 0, "splash attention"
    assert any("mlp" in row["place"] for row in result["places"])
    assert all(row["times"] >= 1 and row["bytes"] > 0 for row in result["collectives"])
    assert text.read_text().startswith("HloModule")
    arguments = result["arguments"]
    assert arguments["optimizer"] == pytest.approx(2 * arguments["weights"], rel=0.01), "adamw"
    assert 0.7 < sum(arguments.values()) / result["arguments_bytes"] <= 1, "of so small arrays much is padding"
    assert 0.3 < result["buffers_bytes"] / result["heap_bytes"] < 1.1, (
        "the rest of a small program is the compiler's own"
    )
    assert 0 < sum(row["bytes"] for row in result["buffers"]) <= result["buffers_bytes"]
    assert sum(result["buffers_by_part"].values()) == result["buffers_bytes"]
    assert result["buffers_by_part"].keys() & {"mlp", "attention", "head", "optimizer"}
    assert main(["compile", config, *SETTINGS, "--on", "v5e-4"]) == 0
    out = capsys.readouterr().out
    assert "MFU" in out and "at work" in out and "optimizer" in out


def test_what_the_compiler_says_of_a_step_without_room():
    short = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (40.97G) exceeds "
        "available HBM (15.75G)."
    )
    assert without_room(short).endswith("(40.97G) exceeds available HBM (15.75G), by 25.2G")
    listed = (
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 21.00G of "
        "15.75G hbm. Exceeded hbm capacity by 5.25G. Total hbm usage >= 21.5G: reserved 530.00M program 20.97G Largest "
        'program allocations in hbm: 1. Size: 6.00G Operator: op_name="jit(_step)/jvp(head)/BTD,DV->BTV/dot_general" '
        "source_line=1 Shape: f32[12,1024,131072]{2,1,0:T(8,128)} Unpadded size: 6.00G XLA label: fusion.1 = fusion() "
        "Allocation type: HLO temp ========== 2. Size: 2.00G Shape: bf16[1024,1024,1024]{2,1,0} Unpadded size: 2.00G"
    )
    said = without_room(listed)
    assert "Exceeded hbm capacity by 5.25G; its largest buffers are 6.00G f32[12,1024,131072] head" in said
    assert said.endswith("2.00G bf16[1024,1024,1024] other") and "reserved" not in said


@pytest.mark.tpu
@pytest.mark.xdist_group("tpu")
def test_what_does_not_fit_says_so(config, capsys):
    wide = ["model.d_model=8192", "model.d_ff=32768", "model.num_heads=64", "model.num_layers=24"]
    assert main(["compile", config, *SETTINGS[:1], *wide, *SETTINGS[5:7], "--on", "v5e:2x2"]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert "the step does not fit on TPU v5 lite" in said and "by formulas it needs, in GiB: " in said
    assert "weights" in said and "optimizer" in said


@pytest.mark.tpu
@pytest.mark.long
@pytest.mark.xdist_group("tpu")
def test_products_in_each_type_on_a_slice(config, capsys):
    assert main(["compile", config, *SETTINGS, "--quant", "--on", "v5e:2x2"]) == 0
    text = capsys.readouterr().out
    assert "M cycles" in text
    assert "TPU v5e multiplies fp8 not natively; it does int8, twice as fast" in text


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--on", "v9:1x1"], "there is no such machine"),
        (["--on", "h100:8"], "there is a compiler for TPUs alone"),
        (["--on", "2xv5e-4"], "mesh.slices=1; make them the same"),
        (["--on", "v5e-4", "--top", "0"], "--top is a count from 1"),
        (["--on", "v5e-4", "--quant", "--hlo", "x"], "leave out --quant"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_refuses_with_a_sentence(config, capsys, arguments, sentence):
    assert main(["compile", config, *SETTINGS, *arguments]) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.tpu
@pytest.mark.xdist_group("tpu")
@pytest.mark.parametrize("name", ["v4-8", "v5e-4", "v5p-8", "v6e-4", "tpu7x-8"])
def test_the_compiler_has_as_many_devices_for_a_slice_as_its_vms(name):
    where = target(name)
    assert where.topology
    devices = topology_devices(where.topology)
    assert len(devices) == where.place.num_devices
    assert detect(devices[0]) == where.place.chip
