"""Jobs for a SLURM cluster: a job script, a chain of jobs, and the checks that scripts in `slurm/` run at their start.

script.py  one job's script  →  chain.py  pretrain → SFT → export by dependency  →  job.py  runs inside the job
"""
