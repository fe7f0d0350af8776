"""The ten questions of the data set, in its order."""

QUESTIONS = (
    "What are the key elements in this scene?",
    "Can you elaborate on the elements of the scene provided?",
    "What is this scene about?",
    "What is the layout of the road?",
    "What vehicles are present and how are they positioned?",
    "What do you think is going on?",
    "What elements are present?",
    "What do you see happening?",
    "Describe the following scene.",
    "What types of vehicles are there and how are they positioned?",
)
