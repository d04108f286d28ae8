"""Folders go from Hugging Face to a checkpoint and back, bit for bit; nothing half-written looks whole."""

import contextlib
import hashlib
import itertools
import json
import os
import re
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
import yaml
from helpers import one_document, our_logits, program_on, small_config
from test_convert import CASES, SCALED, SIZES, random_tensors, read

from maxlm import fingerprint
from maxlm.checkpoint import Checkpoints
from maxlm.cli import main
from maxlm.config import CheckpointConfig
from maxlm.convert import zarr
from maxlm.convert.arrays import ArrayWriter
from maxlm.convert.families import FAMILIES, FamilyError
from maxlm.convert.folders import ConvertError
from maxlm.convert.from_hf import from_hf
from maxlm.convert.mapping import entries
from maxlm.convert.parallel import BAND, bands, contiguous, run_all
from maxlm.convert.safetensors import INDEX, SINGLE, Folder, SafetensorsError
from maxlm.convert.safetensors_writer import Writer
from maxlm.convert.to_hf import to_hf
from maxlm.data.tokenizer import train_bpe
from maxlm.init_from import read_parameters
from maxlm.leaves import named_leaves
from maxlm.manifest import CheckpointError, DamagedError
from maxlm.steps import StepError

BF16 = np.dtype(ml_dtypes.bfloat16)
SHARED = {"max_position_embeddings": 64, "torch_dtype": "bfloat16", "eos_token_id": 7, "pad_token_id": None}


def write_model(folder, name="llama", dtype=BF16, shard_bytes=10**9, **changed):
    """A folder as transformers writes it, made with numpy alone."""
    tensors = {**random_tensors(entries(*read(name)), dtype), **changed}
    tensors = {k: v for k, v in tensors.items() if v is not None}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**CASES[name], **SHARED}))
    with Writer(str(folder), {k: (v.dtype, v.shape) for k, v in tensors.items()}, shard_bytes) as writer:
        for key, values in tensors.items():
            writer.write(key, values)
    return tensors


def hashes(folder):
    """Type, shape and hash of the bytes of every tensor."""
    with contextlib.closing(Folder(str(folder))) as model:
        return {n: (t.dtype, t.shape, hashlib.sha256(model.read(n)).hexdigest()) for n, t in model.tensors.items()}


@pytest.mark.parametrize("name", CASES)
def test_a_round_trip_gives_the_same_bits(name, tmp_path):
    dtype = np.dtype(np.float32) if "qwen" in name else BF16
    write_model(tmp_path / "hf", name, dtype, 3_000)
    shutil.copy(tmp_path / "hf" / "config.json", tmp_path / "hf" / "generation_config.json")
    (tmp_path / "hf" / "chat_template.jinja").write_text("{{ messages }}")
    done = from_hf(str(tmp_path / "hf"), str(tmp_path / "ours"), verify=True)
    assert done.companions == ["generation_config.json", "chat_template.jinja"]
    to_hf(str(tmp_path / "ours"), str(tmp_path / "back"), verify=True, shard_bytes=5_000)
    assert hashes(tmp_path / "back") == hashes(tmp_path / "hf")
    assert (tmp_path / "back" / INDEX).exists()
    for file in done.companions:
        assert (tmp_path / "back" / file).read_bytes() == (tmp_path / "hf" / file).read_bytes()
    before, after = (json.loads((tmp_path / f / "config.json").read_text()) for f in ("hf", "back"))
    assert before.items() <= {**after, "torch_dtype": "bfloat16"}.items()
    assert (after["torch_dtype"], after["architectures"]) == (dtype.name, [FAMILIES[done.family].architecture])
    assert sorted(os.listdir(tmp_path)) == ["back", "hf", "ours"]


def test_checkpoints_are_whole_to_those_who_read_them(tmp_path, capsys):
    write_model(tmp_path / "hf")
    assert main(["convert", "from-hf", str(tmp_path / "hf"), str(tmp_path / "m"), "--verify", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["family"], shown["tensors"], shown["verified"]) == ("llama", 39, True)
    assert main(["checkpoint", "verify", str(tmp_path / "m")]) == 0
    assert main(["convert", "from-hf", str(tmp_path / "hf"), str(tmp_path / "m")]) == 2
    assert "is there already" in capsys.readouterr().err


def test_the_bytes_stay_as_they_are_and_others_may_have_written_them(tmp_path):
    tensors = write_model(tmp_path / "hf")
    from_hf(str(tmp_path / "hf"), str(tmp_path / "m"))
    step = tmp_path / "m" / "checkpoints" / "0"
    for ours, theirs in [("attention.q/2.0.0.0", "self_attn.q_proj"), ("mlp.down/2.0.0", "mlp.down_proj")]:
        data = (step / f"params.layers.0.{ours}").read_bytes()
        assert data == tensors[f"model.layers.2.{theirs}.weight"].tobytes()
    for about in step.rglob(zarr.FILE):
        about.write_text(json.dumps({**json.loads(about.read_text()), "attributes": {}}))
    to_hf(str(tmp_path / "m"), str(tmp_path / "back"), verify=True)
    assert hashes(tmp_path / "back") == hashes(tmp_path / "hf")


def test_a_scalar_has_no_shares():
    layout = zarr.Layout.of_shares(np.dtype("float32"), (), 0, ())
    assert layout.shape == () and layout.files(()) is None


def test_a_run_whose_own_name_looks_like_a_step_is_that_run(tmp_path):
    write_model(tmp_path / "hf")
    from_hf(str(tmp_path / "hf"), str(tmp_path / "m"))
    shutil.copytree(tmp_path / "m", tmp_path / "m@0")
    shutil.rmtree(tmp_path / "m" / "checkpoints")
    to_hf(str(tmp_path / "m@0"), str(tmp_path / "back"))
    assert hashes(tmp_path / "back") == hashes(tmp_path / "hf")


def init_program(folder, more, train, **mesh):
    model = yaml.safe_load((folder / "model.yaml").read_text())["model"]
    unset = {"num_kv_heads": None, "head_dim": None, "vocab_multiple": 128}
    config = small_config(model={**unset, **model, **more}, train=train)
    return program_on(config, **mesh)


@pytest.mark.parametrize("mesh", [{}, {"fsdp": 2, "tensor": 2}, {"stage": 3}], ids=str)
def test_a_run_begins_with_them_and_a_trained_one_goes_back(mesh, tmp_path, monkeypatch):
    monkeypatch.setattr(zarr, "CHUNK_BYTES", 2_000)  # of a real one 64 MiB: some parameters are several files
    tensors = write_model(tmp_path / "hf")
    from_hf(str(tmp_path / "hf"), str(tmp_path / "m"))
    assert len(list((tmp_path / "m" / "checkpoints" / "0" / "params.embed").iterdir())) > 3
    program = init_program(tmp_path / "m", {}, {}, **mesh)
    with contextlib.closing(Checkpoints(str(tmp_path / "m"), CheckpointConfig(), read_only=True)) as other:
        params = read_parameters(other, 0, program)
    with jax.set_mesh(program.mesh):
        state = program.begin(params)
    assert {str(x.dtype) for x in named_leaves(state["params"]).values()} == {"float32"}
    run = {"model": program.config.model.model_dump(mode="json"), "train": {"seq_len": 12}}
    mine = Checkpoints(str(tmp_path / "run"), CheckpointConfig(), run=run)
    mine.save(3, state)
    mine.wait()
    mine.close()
    to_hf(str(tmp_path / "run"), str(tmp_path / "back"), dtype="bfloat16", verify=True)
    with contextlib.closing(Folder(str(tmp_path / "back"))) as back:
        assert {n: back.read(n).tobytes() for n in back.tensors} == {n: x.tobytes() for n, x in tensors.items()}
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (config["model_type"], config["max_position_embeddings"], config["vocab_size"]) == ("llama", 12, 250)
    (tmp_path / "hf" / "chat_template.jinja").write_text("{{ messages }}")
    done = to_hf(str(tmp_path / "run"), str(tmp_path / "liked"), like=str(tmp_path / "hf"))
    assert (done.companions, done.family) == (["chat_template.jinja"], "llama")
    assert json.loads((tmp_path / "liked" / "config.json").read_text())["max_position_embeddings"] == 64
    with pytest.raises(ConvertError, match="nowhere, .* is not a folder"):
        to_hf(str(tmp_path / "run"), str(tmp_path / "x"), like="nowhere")
    assert to_hf(str(tmp_path / "run@3"), str(tmp_path / "same")).num_tensors == done.num_tensors
    for place, step in (("run", 4), ("run@4", None)):
        with pytest.raises(StepError, match=r"no checkpoint of step 4; it has \[3\]"):
            to_hf(str(tmp_path / place), str(tmp_path / "x"), step=step)
    with pytest.raises(StepError, match="names another checkpoint than step=4"):
        to_hf(str(tmp_path / "run@3"), str(tmp_path / "x"), step=4)


def test_types_on_request(tmp_path):
    tensors = write_model(tmp_path / "hf", dtype=np.dtype(np.float32))
    from_hf(str(tmp_path / "hf"), str(tmp_path / "m"), dtype="bfloat16", verify=True)
    to_hf(str(tmp_path / "m"), str(tmp_path / "back"), dtype="float16", verify=True)
    with contextlib.closing(Folder(str(tmp_path / "back"))) as back:
        for name, values in tensors.items():
            assert back.read(name).tobytes() == values.astype(BF16).astype(np.float16).tobytes()


NAME = "model.layers.2.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({NAME: None}, f"no tensor {NAME}"),
        ({NAME: np.zeros((24, 28), BF16)}, f"{NAME} is \\[24, 28\\]"),
        ({"model.layers.9.more": np.zeros(3, BF16)}, "'model.layers.9.more' that has no place"),
        ({NAME: np.zeros((28, 24), np.float32)}, f"{NAME} .*is float32.*--dtype"),
        ({NAME: np.zeros((28, 24), np.int8)}, f"{NAME} .*is int8; maxlm converts float32"),
    ],
)
def test_tensors_that_do_not_fit_are_named(changed, says, tmp_path):
    write_model(tmp_path / "hf", **changed)
    with pytest.raises((FamilyError, ConvertError), match=says):
        from_hf(str(tmp_path / "hf"), str(tmp_path / "m"))
    assert os.listdir(tmp_path) == ["hf"]


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"model_type": "gpt5"}, "config.json: model_type='gpt5' is not a family"),
        ({"num_hidden_layers": 2**60}, "num_hidden_layers=.*more than"),
        ({"intermediate_size": 2**60}, "intermediate_size=.*more than"),
        ({"num_hidden_layers": 5}, "no tensor model.layers.4"),
        ({"num_hidden_layers": 3}, "'model.layers.3.input_layernorm.weight' that has no place"),
        ({"vocab_size": 251}, r"embed_tokens.weight is \[250, 24\], and config.json makes it \[251, 24\]"),
        ({"tie_word_embeddings": True}, "lm_head.weight differs from model.embed_tokens.weight"),
        ({"rope_scaling": {**SCALED}}, "original_max_position_embeddings"),
    ],
)
def test_configs_that_do_not_fit_are_refused(changed, says, tmp_path, capsys):
    write_model(tmp_path / "hf")
    (tmp_path / "hf" / "config.json").write_text(json.dumps({**CASES["llama"], **changed}))
    assert main(["convert", "from-hf", str(tmp_path / "hf"), str(tmp_path / "m")]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert re.search(says, error), error
    assert os.listdir(tmp_path) == ["hf"]


def test_other_files_that_are_refused(tmp_path):
    write_model(tmp_path / "hf")
    hf, out = tmp_path / "hf", str(tmp_path / "m")
    (hf / "tokenizer.json").write_bytes(train_bpe([f"some text {i * i}" for i in range(200)], 300))
    with pytest.raises(FamilyError, match="makes ids up to .*vocab_size=250"):
        from_hf(str(hf), out)
    (hf / "tokenizer.json").write_text("{}")
    with pytest.raises(FamilyError, match="is no tokenizer"):
        from_hf(str(hf), out)
    (hf / "tokenizer.json").unlink()
    for text, says in [("[]", "list"), ('{"a": 1, "a": 1}', "twice"), ("{", "JSON"), (" " * (2 << 20), "another file")]:
        (hf / "config.json").write_text(text)
        with pytest.raises(FamilyError, match=rf"config\.json.*{says}"):
            from_hf(str(hf), out)
    (hf / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="config.json does not exist"):
        from_hf(str(hf), out)
    assert os.listdir(tmp_path) == ["hf"]


def test_buckets_are_refused(tmp_path):
    write_model(tmp_path / "hf")
    with pytest.raises(ConvertError, match="gs://b/m is in a bucket"):
        from_hf(str(tmp_path / "hf"), "gs://b/m")
    with pytest.raises(StepError, match="gs://b/m is in a bucket"):
        to_hf("gs://b/m", str(tmp_path / "out"))


def test_damage_is_found(tmp_path):
    write_model(tmp_path / "hf")
    from_hf(str(tmp_path / "hf"), str(tmp_path / "m"))
    chunk = tmp_path / "m" / "checkpoints" / "0" / "params.layers.0.mlp.up" / "2.0.0"
    data = bytearray(chunk.read_bytes())
    data[7] ^= 1
    chunk.write_bytes(data)
    with pytest.raises(DamagedError, match="array params/layers/0/mlp/up is not the one"):
        to_hf(str(tmp_path / "m"), str(tmp_path / "back"))
    chunk.write_bytes(data[:9])
    with pytest.raises(CheckpointError, match="cannot read layers/0/mlp/up"):
        to_hf(str(tmp_path / "m"), str(tmp_path / "back"))
    weights = tmp_path / "hf" / SINGLE
    os.truncate(weights, weights.stat().st_size - 1)
    with pytest.raises(SafetensorsError, match="cut off"):
        from_hf(str(tmp_path / "hf"), str(tmp_path / "m2"))
    assert sorted(os.listdir(tmp_path)) == ["hf", "m"]


@pytest.mark.parametrize("way", ["from", "to"])
def test_what_is_interrupted_leaves_no_folder(way, tmp_path, monkeypatch):
    write_model(tmp_path / "hf")
    from_hf(str(tmp_path / "hf"), str(tmp_path / "m"))
    kind, method = (ArrayWriter, "write") if way == "from" else (Writer, "write_pieces")
    before, calls = getattr(kind, method), []

    def write(self, *args):
        calls.append(sorted(os.listdir(tmp_path)))
        if len(calls) == 20:
            raise KeyboardInterrupt
        return before(self, *args)

    monkeypatch.setattr(kind, method, write)
    convert, source = (from_hf, "hf") if way == "from" else (to_hf, "m")
    with pytest.raises(KeyboardInterrupt):
        convert(str(tmp_path / source), str(tmp_path / "out"))
    (partial,) = set(calls[-1]) - {"hf", "m"}
    assert re.fullmatch(r"\.out\.[0-9a-f]{8}\.partial", partial)  # what a kill would leave
    assert sorted(os.listdir(tmp_path)) == ["hf", "m"]


@pytest.mark.oracle
@pytest.mark.parametrize("name", CASES)
def test_what_transformers_saves_gives_its_logits(name, tmp_path):
    """From its own files to logits on a mesh, with a window and contexts longer than RoPE was made for."""
    import torch
    import transformers

    family, model = read(name)
    none = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "max_position_embeddings": 64}
    (tmp_path / "config.json").write_text(json.dumps({**family.write_config(model), **none}))
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    peer = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    rng = torch.Generator().manual_seed(0)
    for key, parameter in peer.named_parameters():
        parameter.data = ("norm" in key and not model.norm_offset) + 0.2 * torch.randn(parameter.shape, generator=rng)
    peer.save_pretrained(tmp_path / "hf", max_shard_size="5KB")
    from_hf(str(tmp_path / "hf"), str(tmp_path / "m"), verify=True)

    program = init_program(tmp_path / "m", {"dtype": "float32"}, {"seq_len": 32}, fsdp=2, tensor=2)
    with contextlib.closing(Checkpoints(str(tmp_path / "m"), CheckpointConfig(), read_only=True)) as other:
        params = jax.device_get(read_parameters(other, 0, program))
    batch = one_document(program.config)
    want = peer(input_ids=torch.tensor(batch["tokens"][0], dtype=torch.long)).logits.detach().numpy()
    got = our_logits(program, params, batch)[..., : model.vocab_size]
    assert want.std() > 0.1 and np.abs(got - want).max() <= 2e-5
    to_hf(str(tmp_path / "m"), str(tmp_path / "back"))
    assert hashes(tmp_path / "back") == hashes(tmp_path / "hf")


@pytest.mark.oracle
def test_transformers_loads_what_a_run_gives(tmp_path):
    import torch
    import transformers

    tensors = write_model(tmp_path / "hf", "llama, scaled", np.dtype(np.float32))
    from_hf(str(tmp_path / "hf"), str(tmp_path / "m"))
    to_hf(str(tmp_path / "m"), str(tmp_path / "back"), shard_bytes=4_000)
    ids = torch.arange(48)[None]
    logits = []
    for folder in ("hf", "back"):
        model, about = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / folder, output_loading_info=True)
        assert not any(about.values()), about
        assert model.dtype == torch.float32 or folder == "hf"
        logits.append(model.float()(input_ids=ids).logits)
    assert SIZES["vocab_size"] == logits[1].shape[-1] and len(tensors) == 39
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    assert torch.equal(peer(input_ids=ids).logits, logits[1])


@pytest.mark.parametrize("shape", [(1000, 777), (2051, 51, 10), (3, 5), (700_001, 1), (0, 4), (6, 500, 301)])
@pytest.mark.parametrize("dtype", [BF16, np.dtype(np.float32)], ids=str)
def test_an_array_of_any_strides_is_made_contiguous(shape, dtype):
    x = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    orders = list(itertools.permutations(range(x.ndim)))
    for given in [*(x.transpose(order) for order in orders), x[:, ::-1].swapaxes(0, 1), x[1:, 1:].swapaxes(0, 1)]:
        assert contiguous(given).tobytes() == given.tobytes()
        pieces = list(bands(given))
        assert b"".join(piece.tobytes() for piece in pieces) == given.tobytes()
        assert all(piece.flags.c_contiguous and piece.nbytes <= max(BAND, given[:1].nbytes) for piece in pieces)


@pytest.mark.parametrize("dtype", [BF16, np.dtype(np.float32), np.dtype(np.int8)], ids=str)
@pytest.mark.parametrize("small", [3, 12])
def test_a_fingerprint_taken_in_parts_is_that_of_the_whole(dtype, small, monkeypatch):
    monkeypatch.setattr(fingerprint, "PART", 7)
    monkeypatch.setattr(fingerprint, "SMALL", small)
    monkeypatch.setattr(fingerprint, "ROW", 2)
    x, running = np.random.default_rng(0).integers(0, 99, (5, 3, 4)).astype(dtype), fingerprint.Running()
    for i in (3, 0, 4, 2, 1):
        running.add(x[i], i * 12)
    with jax.set_mesh(jax.make_mesh((1,), ("a",), (jax.sharding.AxisType.Explicit,))):
        assert fingerprint.fingerprints({"x": jax.numpy.asarray(x)})() == {"x": running.text()}
    for order in itertools.permutations(range(3)):
        other, stored = fingerprint.Running(), x.transpose(order)
        for i in range(len(stored)):
            strides = [(12, 4, 1)[dim] for dim in order]
            other.add(stored[i : i + 1], i * strides[0], strides)
        assert other.text() == running.text(), order


def test_a_job_that_fails_ends_those_that_have_not_begun():
    done, begun = [], []

    def job(i):
        begun.append(i)
        if i == 3:
            raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        run_all(((1 << 40, lambda i=i: job(i)) for i in range(9)), done.append)  # each alone: larger than the limit
    assert (begun, len(done)) == ([0, 1, 2, 3], 4)


def test_names_without_their_prefix_and_buffers_are_understood(tmp_path):
    """The first GPT-2 files were of the model without its head, and held the causal mask."""
    tensors = write_model(tmp_path / "hf", "gpt2")
    (tmp_path / "bare").mkdir()
    shutil.copy(tmp_path / "hf" / "config.json", tmp_path / "bare")
    bare = {name.removeprefix("transformer."): values for name, values in tensors.items()}
    bare |= {f"h.{i}.attn.bias": np.ones((1, 1, 40, 40), np.float32) for i in range(4)}
    with Writer(str(tmp_path / "bare"), {k: (v.dtype, v.shape) for k, v in bare.items()}) as writer:
        for name, values in bare.items():
            writer.write(name, values)
    from_hf(str(tmp_path / "bare"), str(tmp_path / "ours"), verify=True)
    to_hf(str(tmp_path / "ours"), str(tmp_path / "back"))
    assert hashes(tmp_path / "back") == hashes(tmp_path / "hf")
