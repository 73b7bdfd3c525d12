"""QLoRA with transformers, PEFT and TRL. The arguments are a model, a JSONL file, and the number of steps."""

import sys
import time

import torch
from datasets import load_dataset
from peft import LoraConfig, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from pyquant import BitsAndBytesConfig

model_name, data, steps = sys.argv[1:]
quantization = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.bfloat16,
)
device = "cuda" if torch.cuda.is_available() else "cpu"
model = AutoModelForCausalLM.from_pretrained(
    model_name, quantization_config=quantization, device_map={"": device}, dtype=torch.bfloat16
)
model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
rows = load_dataset("json", data_files=data, split="train")
rows = rows.map(
    lambda row: {"prompt": f"{row['instruction']}\n{row['input']}\n", "completion": row["output"]},
    remove_columns=rows.column_names,
)
torch.manual_seed(0)
trainer = SFTTrainer(
    model=model,
    args=SFTConfig(
        output_dir="runs/drop-in",
        max_steps=int(steps),
        per_device_train_batch_size=8,
        gradient_checkpointing=False,
        learning_rate=1e-3,
        max_length=128,
        bf16=True,
        use_cpu=device == "cpu",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=0,
    ),
    train_dataset=rows,
    processing_class=AutoTokenizer.from_pretrained(model_name),
    peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
)
start = time.perf_counter()
trainer.train()
seconds = (time.perf_counter() - start) / int(steps)
losses = [round(entry["loss"], 4) for entry in trainer.state.log_history if "loss" in entry]
print(f"{seconds:.3f} s a step; losses {losses}")
