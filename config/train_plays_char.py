# A character-level GPT on Shakespeare's plays (python prepare.py plays), sized by what it runs on. Its shape
# is Qwen3's and its optimizer Muon; docs/modern.md explains each part, and what it gains.
import torch

out_dir = "out/plays_char"
dataset = "plays"
gradient_accumulation_steps = 1
log_interval = 10

if torch.cuda.is_available():  # 10.7M parameters
    n_layer = 6
    n_head = 6
    n_embd = 384
    n_inner = 1024  # 8/3 n_embd: with its gate, SwiGLU has as many weights as an MLP of 4 n_embd
    dropout = 0.2
    block_size = 256
    batch_size = 64
    max_iters = 3000
    eval_interval = 500
else:  # 0.5M parameters, a few minutes on two CPU cores
    n_layer = 3
    n_head = 4
    n_kv_head = 1
    n_embd = 128
    n_inner = 344
    block_size = 128
    batch_size = 16
    max_iters = 1200
    eval_interval = 300
    eval_iters = 30

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
