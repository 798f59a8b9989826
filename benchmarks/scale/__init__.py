"""Training in several processes: does each way of it give what one process gives, and what does a step send?"""
