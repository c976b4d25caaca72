"""What comes out of runs: figures with their errors, tables, the leaderboard, the paper's tables beside ours."""
