# nanoGPT's recipe: a character-level GPT on tiny Shakespeare (python prepare.py shakespeare_char).
# The model overfits this small text, so best.pt is the checkpoint to keep.
out_dir = "out-shakespeare-char"
dataset = "shakespeare_char"
eval_interval = 250
eval_iters = 200
log_interval = 10
always_save_checkpoint = False

wandb_log = False
wandb_project = "shakespeare-char"
wandb_run_name = "mini-gpt"

n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2

block_size = 256  # context of up to 256 characters
batch_size = 64
gradient_accumulation_steps = 1

max_iters = 5000
learning_rate = 1e-3
warmup_iters = 100
min_lr = learning_rate / 10
beta2 = 0.99  # a bit larger, since a step sees few tokens
