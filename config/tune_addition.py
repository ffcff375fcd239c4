# A model that knows some sums learns the others from a function that checks them: no answer is shown to it.
#   python prepare.py addition
#   python train.py config/train_addition.py --max_iters=155 --out_dir=out/addition_some
#   python tune.py config/tune_addition.py
reward = "rewards/addition.py"
out_dir = "out/addition_tuned"
dataset = "addition"
init_from = "out/addition_some"

method = "best"
prompts_per_step = 192
num_samples = 8
max_new_tokens = 5
batch_size = 1536
updates = 16

max_iters = 40
learning_rate = 8e-4
schedule = "linear"
min_lr = 0.0

eval_prompts = 200
eval_interval = 20
always_save_checkpoint = False  # best.pt is the one to keep
