"""The groups of commands behind `accrual`, one file each."""
