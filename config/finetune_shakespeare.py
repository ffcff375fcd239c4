# Fine-tune GPT-2 XL on tiny Shakespeare (python prepare.py shakespeare); --init_from=gpt2 is smaller.
import time

out_dir = "out-shakespeare"
dataset = "shakespeare"
init_from = "gpt2-xl"
eval_interval = 5
eval_iters = 40
always_save_checkpoint = False

wandb_log = False
wandb_project = "shakespeare"
wandb_run_name = f"ft-{time.time()}"

# 1 sequence x 32 micro-batches x 1024 tokens = 32,768 tokens a step; 20 steps see the text about twice
batch_size = 1
gradient_accumulation_steps = 32
max_iters = 20
learning_rate = 3e-5
decay_lr = False
