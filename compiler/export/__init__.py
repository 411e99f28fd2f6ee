"""Ways out of the compiler other than an artefact: models in other formats."""
