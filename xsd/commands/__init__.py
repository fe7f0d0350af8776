"""One module an MLproject entry point: it pulls from the rooms and logs what they yield."""
