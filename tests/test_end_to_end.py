"""QLoRA as it is written for bitsandbytes, with stock transformers, PEFT and TRL: one import changes, and the losses
stay."""

import json
import subprocess
import sys

import pytest
import torch
from tiny import ROWS, make_tiny_model

pytest.importorskip("bitsandbytes")
pytest.importorskip("trl")

THEIRS = "from transformers import BitsAndBytesConfig"
OURS = "from pyquant import BitsAndBytesConfig"

SCRIPT = """
import json, sys

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers import BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

model_name, rows, output = sys.argv[1:]
quantization = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.bfloat16,
)
tokenizer = AutoTokenizer.from_pretrained(model_name)
model = AutoModelForCausalLM.from_pretrained(
    model_name, quantization_config=quantization, device_map={"": "cpu"}, dtype=torch.bfloat16
)
model = prepare_model_for_kbit_training(model)
torch.manual_seed(0)
lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
trainer = SFTTrainer(
    model=model,
    args=SFTConfig(
        output_dir=output, max_steps=10, per_device_train_batch_size=4, learning_rate=1e-2, logging_steps=1,
        save_strategy="no", report_to="none", use_cpu=True, bf16=True, completion_only_loss=True, max_length=32,
        gradient_checkpointing=True, disable_tqdm=True, seed=0,
    ),
    train_dataset=Dataset.from_list(json.loads(rows)),
    processing_class=tokenizer,
    peft_config=lora,
)
trainer.train()
trainer.save_model(output + "/adapter")
reloaded = AutoModelForCausalLM.from_pretrained(
    model_name, quantization_config=quantization, device_map={"": "cpu"}, dtype=torch.bfloat16
)
reloaded = PeftModel.from_pretrained(reloaded, output + "/adapter")
answer = reloaded.generate(**tokenizer("red red", return_tensors="pt", return_token_type_ids=False), max_new_tokens=3)
layer = reloaded.get_submodule("base_model.model.model.layers.0.mlp.up_proj")
result = {
    "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
    "layer": type(layer).__module__,
    "generated": answer.shape[1],
}
print("RESULT", json.dumps(result))
"""


def run(script, tmp_path, name):
    words = [str(tmp_path / "model"), json.dumps(ROWS), str(tmp_path / name)]
    result = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, timeout=300)
    assert not result.returncode, result.stderr
    line = next(line for line in result.stdout.splitlines() if line.startswith("RESULT "))
    return json.loads(line.removeprefix("RESULT "))


def test_a_script_for_bitsandbytes_trains_with_one_import_changed(tmp_path):
    make_tiny_model(tmp_path / "model")
    assert SCRIPT.count(THEIRS) == 1
    theirs = run(SCRIPT, tmp_path, "theirs")
    ours = run(SCRIPT.replace(THEIRS, OURS), tmp_path, "ours")
    assert theirs["layer"] == "peft.tuners.lora.bnb"
    assert ours["layer"] == "pyquant.integrations.peft"
    assert ours["generated"] == theirs["generated"]
    assert len(ours["losses"]) == 10
    assert ours["losses"][-1] < 0.5 * ours["losses"][0]
    # bfloat16 products in another order: the curves are close, not equal.
    torch.testing.assert_close(torch.tensor(ours["losses"]), torch.tensor(theirs["losses"]), rtol=0.1, atol=0.05)
