"""SMT as a tuner of PEFT: the model, the layers, and which forward a layer takes."""
