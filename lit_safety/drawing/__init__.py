"""Drawing prompts with any number of arms: prompts, pipelines, gallery, edits, guards."""
