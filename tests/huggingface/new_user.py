"""What somebody does who has the export alone: no vpstore, no recipes. Prints what they see as JSON.

Arguments: the folder, a file of token ids with the logits that they should give, a folder to save to.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.modules["vpstore"] = sys.modules["recipes"] = None  # type: ignore[assignment]  # an import of either raises

import torch  # noqa: E402 - after the two that must not be there
from safetensors import safe_open  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402


def stored(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as opened:
            found.update({name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118
    return found


folder, saved = Path(sys.argv[1]), Path(sys.argv[3])
known = torch.load(sys.argv[2])
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32, device_map="auto")
with torch.no_grad():
    logits = model(known["ids"]).logits
talk = [{"role": "user", "content": "What is 2 + 2?"}]
prompt = tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_tensors="pt", current_date="2026-01-01")
said = model.generate(**prompt, max_new_tokens=12, do_sample=False)
kept = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
kept.save_pretrained(saved)
before, after = stored(folder), stored(saved)
again = AutoModelForCausalLM.from_pretrained(saved, trust_remote_code=True)
narrow = kept.state_dict()
print(
    json.dumps(
        {
            "apart": float((logits - known["logits"]).abs().max() / known["logits"].abs().max()),
            "prompt": tokenizer.decode(prompt["input_ids"][0]),
            "said": said.shape[1] - prompt["input_ids"].shape[1],
            "stops": model.generation_config.eos_token_id,
            "longest": tokenizer.model_max_length,
            "ends": [tokenizer.eos_token, tokenizer.pad_token],
            "dtype": str(kept.dtype),
            "wide": sorted({name.rpartition(".")[2] for name, one in narrow.items() if one.dtype == torch.float32}),
            "names": sorted(before) == sorted(after),
            "bytes": all(torch.equal(before[name], after[name]) for name in before),
            "again": bool(torch.equal(again(known["ids"]).logits, kept(known["ids"]).logits)),
        }
    )
)
