# Fine-tune SmolLM2-135M-Instruct, a small chat model, on conversations. Two CPU cores take some hours for a
# large file; a few hundred conversations take half an hour.
#   python prepare.py plays_chat --tokenizer=smollm2
#   python train.py config/finetune_smollm2.py
# With conversations of your own: python prepare.py mychats.jsonl --tokenizer=smollm2 --name=mine, and
# --dataset=mine --out_dir=out/mine.
out_dir = "out/smollm2"
dataset = "plays_chat_smollm2"
init_from = "smollm2"
data_order = "epoch"

# its own longest context is 8,192 tokens; a row of 256 holds a few short conversations
block_size = 256
batch_size = 4
gradient_accumulation_steps = 2  # 2,048 tokens a step

max_iters = 200
learning_rate = 1e-4  # more makes it forget what it knew
min_lr = 0.0
warmup_iters = 10
weight_decay = 0.0
beta2 = 0.99

eval_interval = 50
eval_iters = 10
log_interval = 5
always_save_checkpoint = False  # best.pt is the one to keep
