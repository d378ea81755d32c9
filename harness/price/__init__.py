"""What a plan will cost, by arithmetic: memory, time, disk and money of its trials before any of them runs."""
