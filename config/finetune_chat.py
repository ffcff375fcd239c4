# Fine-tune the demo's model to answer, on the dialogue of the plays. After the demo:
#   python prepare.py plays_chat --tokenizer=data/plays
#   python train.py config/finetune_chat.py
out_dir = "out/chat"
dataset = "plays_chat_plays"  # plays_chat, in the tokens of plays
init_from = "out/plays_char"  # its block_size decides which exchanges fit
data_order = "epoch"
gradient_accumulation_steps = 1

# a row holds one exchange or a few; the CPU's model sees each of its 5,700 rows 4 times
batch_size = 32
max_iters = 700
learning_rate = 1e-3  # AdamW's, small, so that the model keeps what it knows
min_lr = 1e-5
warmup_iters = 50
beta2 = 0.99
dropout = 0.1

eval_interval = 100
eval_iters = 50
log_interval = 10
always_save_checkpoint = False  # best.pt is the one to keep
