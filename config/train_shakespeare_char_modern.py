# The text, size and tokens of config/train_shakespeare_char.py, with a modern shape and optimizer; see
# docs/modern.md. It was not run at this size.
out_dir = "out-shakespeare-char-modern"
dataset = "shakespeare_char"
eval_interval = 250
eval_iters = 200
log_interval = 10
always_save_checkpoint = False  # the model overfits this small text: best.pt is the one to keep

n_layer = 6
n_head = 6
n_embd = 384
n_inner = 1024  # 8/3 n_embd: with its gate, SwiGLU has as many weights as an MLP of 4 n_embd
dropout = 0.2
block_size = 256
batch_size = 64
gradient_accumulation_steps = 1
max_iters = 5000

bias = False
norm = "rmsnorm"
positions = "rotary"
qk_norm = True
activation = "swiglu"
tied_head = False
zero_projections = True

optimizer = "muon"
muon_learning_rate = 0.02
learning_rate = 0.008  # AdamW's: of the embedding, the head and the weights of norms
beta1 = 0.8
beta2 = 0.95
weight_decay = 0.0

schedule = "wsd"  # constant, then linear over the last 70% of the steps, to 2%
warmup_iters = 0
cooldown_iters = 0.7
min_lr = learning_rate / 50
