"""A folder whose weights are quantised already (bitsandbytes here; GPTQ and AWQ are folders of the same kind)."""

import torch
from conftest import save_tiny

from preflab.models.loading import load_model


def test_quantised_folder_is_loaded_as_it_is(tmp_path, smol_tokenizer):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    save_tiny(tmp_path / "full", smol_tokenizer, hidden_size=64, head_dim=16)
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    AutoModelForCausalLM.from_pretrained(tmp_path / "full", quantization_config=nf4).save_pretrained(tmp_path / "nf4")
    own, full = load_model(str(tmp_path / "nf4")).eval(), load_model(str(tmp_path / "full")).eval()
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "nf4").eval()
    ids = torch.tensor([[5, 9, 11, 40, 7, 3, 21]])
    with torch.no_grad():
        logits = [model(input_ids=ids).logits for model in (own, reference, full)]
    assert type(own.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    # On some CPUs bitsandbytes itself rounds its scales to bf16, which `load_model` prevents.
    assert torch.allclose(logits[0], logits[1], atol=5e-3) and not torch.allclose(logits[0], logits[2], atol=2e-2)
