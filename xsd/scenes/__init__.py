"""Room 1, file to tensor: event files, videos, the data set's index, synthetic scenes."""
