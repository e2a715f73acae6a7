"""The ground floor: records, where they come from, prompts, and the LightningDataModules made of them."""
