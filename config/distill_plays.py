# A small model of the plays learns from a larger one. First train the teacher, of 3.2M parameters:
#   python train.py config/train_plays_char.py --n_layer=6 --n_head=8 --n_kv_head=2 --n_embd=224 \
#       --n_inner=600 --max_iters=1600 --eval_interval=400 --out_dir=out/plays_teacher
#   python train.py config/train_plays_char.py config/distill_plays.py
teacher = "out/plays_teacher"
out_dir = "out/plays_student"

n_layer = 4  # 0.8M parameters
n_inner = 400
distill_weight = 1.0  # of the teacher alone: better here than half of each
distill_temperature = 1.0
