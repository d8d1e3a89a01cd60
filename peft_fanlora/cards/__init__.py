"""Model cards: what a shared adapter or setting says about itself."""
