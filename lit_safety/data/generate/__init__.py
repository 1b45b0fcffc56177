"""Safety pairs made with the model that is to be aligned: prompts written, images drawn, judged and ranked."""
