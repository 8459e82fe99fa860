"""Jobs for a SLURM cluster: a filled script, a chain of jobs, and what the scripts in `slurm/` ask at their start.

script.py  one job's script  →  chain.py  pretrain → SFT → export by dependency  →  job.py  asked inside the job
"""
