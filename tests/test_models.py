"""Models are read onto any mesh, with the numbers that are in the files, in the type that is asked for."""

import numpy as np
import pytest
from test_convert import entries, read, to_params
from test_convert_folders import write_model

from maxlm.config import MeshConfig
from maxlm.convert.from_hf import from_hf
from maxlm.infer.models import ModelError, open_model
from maxlm.leaves import named_leaves
from maxlm.manifest import DamagedError

ONE = MeshConfig(fake_devices=1)


@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3", "mixtral", pytest.param("gemma3", marks=pytest.mark.long)])
@pytest.mark.parametrize("mesh", [ONE, MeshConfig(fsdp=2, tensor=2, data=2, fake_devices=8)])
def test_a_hugging_face_folder_and_what_was_converted_are_the_same_parameters(name, mesh, tmp_path):
    tensors = write_model(tmp_path / "hf", name, np.dtype(np.float32))
    want = to_params(read(name)[1], entries(*read(name)), tensors)[1]
    from_hf(str(tmp_path / "hf"), str(tmp_path / "ours"))
    for place in ("hf", "ours", "ours@0"):
        opened = open_model(str(tmp_path / place), mesh, "float32")
        found = named_leaves(opened.params)
        assert {p: x.tobytes() for p, x in want.items()} == {p: np.asarray(x).tobytes() for p, x in found.items()}
        assert (opened.context, opened.eos_ids) == (64, (7,))
        if mesh is not ONE:
            q = found["layers/0/attention/q"]
            assert q.addressable_shards[0].data.size * 4 == q.size
    bf16 = open_model(str(tmp_path / "hf"), mesh)
    assert bf16.model.dtype == "bfloat16"
    # routers stay float32, as in training
    types = {str(x.dtype) for path, x in named_leaves(bf16.params).items() if "router" not in path}
    assert types == {"bfloat16"}


def test_what_is_no_model_is_refused(tmp_path):
    write_model(tmp_path / "hf")
    from_hf(str(tmp_path / "hf"), str(tmp_path / "ours"))
    for place, says in (("nowhere", "is no model"), ("ours@3", "no checkpoint of step 3"), ("hf@3", "is no model")):
        with pytest.raises(ModelError, match=says):
            open_model(str(tmp_path / place), ONE)
    with pytest.raises(ModelError, match=r"no tokenizer\.json"):
        _ = open_model(str(tmp_path / "ours"), ONE).tokenizer
    file = next((tmp_path / "ours/checkpoints/0/params.embed").glob("0*"))
    data = bytearray(file.read_bytes())
    data[0] ^= 1
    file.write_bytes(data)
    with pytest.raises(DamagedError, match="params/embed"):
        open_model(str(tmp_path / "ours"), ONE)
