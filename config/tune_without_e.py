# The plays without the letter e: the demo's model, tuned by a function that counts them. After the demo:
#   python tune.py config/tune_without_e.py
reward = "rewards/without_e.py"
pass_reward = 0.0  # no e at all
out_dir = "out/without_e"
dataset = "plays"
init_from = "out/plays_char"

method = "best"
prompt_tokens = 16
prompts_per_step = 32
num_samples = 8
max_new_tokens = 64
batch_size = 256

max_iters = 45
learning_rate = 4e-4
updates = 2

eval_prompts = 64
eval_interval = 15
always_save_checkpoint = False  # best.pt is the one to keep
