"""What a run's rows say: figures, advice while it runs, and the checklist of a paper."""
