"""What every room stands on: errors, files, statistics, ranks."""
