"""Models of every family, from their files, beside transformers: greedy text, and how exact the logits are."""

import numpy as np
import pytest
from helpers import one_document, our_logits, program_on, small_config
from test_convert import CASES, entries, random_tensors, read, to_params
from test_convert_folders import write_model

from maxlm.config import MeshConfig
from maxlm.infer.generate import Generator
from maxlm.infer.models import open_model

pytestmark = pytest.mark.oracle

FLOAT32 = np.dtype(np.float32)
DECODERS = ("ForCausalLM", "LMHeadModel")


def wild_tensors(name):
    """Tensors of a case of which greedy text does not soon repeat itself."""
    wanted = entries(*read(name))
    tensors = random_tensors(wanted, norms=0.0 if read(name)[1].norm_offset else 1.0)
    scales = {e.name: 0.3 if e.parts[0].path == "embed" else 3 if len(e.shape) > 1 else 1 for e in wanted}
    return {key: FLOAT32.type(scales[key]) * values for key, values in tensors.items()}


@pytest.mark.parametrize("name", [name for name in CASES if read(name)[0].architecture.endswith(DECODERS)])
def test_greedy_text_is_that_of_transformers(name, tmp_path):
    """From the same files, split over two devices; prompts of different lengths together, past the sliding window."""
    import torch
    import transformers

    write_model(tmp_path / "hf", name, FLOAT32, **wild_tensors(name))
    peer = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", attn_implementation="eager", dtype=torch.float32
    ).eval()
    peer.generation_config.eos_token_id = None
    rng, count, longest = np.random.default_rng(5), 24, 9
    prompts = [rng.integers(0, 250, length).tolist() for length in (1, 4, longest)]
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    seen = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    want = peer.generate(input_ids=ids, attention_mask=seen, max_new_tokens=count, do_sample=False, pad_token_id=0)
    opened = open_model(str(tmp_path / "hf"), MeshConfig(tensor=2, fake_devices=2), "float32")
    made = Generator(opened.model, opened.params, opened.mesh)
    found = np.stack(list(made.tokens(prompts, count)), 1)
    assert found.tolist() == want[:, longest:].tolist()
    assert len(set(found.flat)) > 20  # texts that say something


@pytest.mark.parametrize("name", ["gemma3", "gemma3, scaled"])
def test_gemma_3_with_its_own_eps_is_as_exact_as_transformers(name, tmp_path, monkeypatch):
    """Its many norms magnify what float32 rounds: both are compared with transformers in float64."""
    import torch
    import transformers

    monkeypatch.setitem(CASES, "hard", {**CASES[name], "rms_norm_eps": 1e-6, "query_pre_attn_scalar": 7})
    family, model = read("hard")
    tensors = random_tensors(entries(family, model), norms=0.0)
    write_model(tmp_path / "hf", "hard", FLOAT32, **tensors)
    config = small_config(model={**model.model_dump(), "dtype": "float32"}, train={"seq_len": 32, "batch_size": 8})
    batch = one_document(config)
    logits = [our_logits(program_on(config), to_params(model, entries(family, model), tensors)[0], batch)[..., :250]]
    for dtype in (torch.float32, torch.float64):
        peer = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "hf", attn_implementation="sdpa", dtype=dtype
        )
        with monkeypatch.context() as patch:
            if dtype == torch.float64:
                patch.setattr(torch.Tensor, "float", torch.Tensor.double)  # norms cast to float32 by name
            logits.append(peer.eval()(torch.tensor(batch["tokens"][0], dtype=torch.long)).logits.detach().numpy())
    ours, theirs, exact = logits
    mean_error = lambda x: float(np.sqrt(np.square(x - exact).mean()))  # noqa: E731
    assert exact.dtype == np.float64 and exact.std() > 0.5
    assert np.abs(ours - exact).max() <= 3e-5
    assert mean_error(ours) <= 1.2 * mean_error(theirs) <= 2e-6
