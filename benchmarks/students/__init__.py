"""What `distillation.py` trains: each module has teachers, students, and the data that they are judged on."""
