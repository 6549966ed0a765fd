"""`python -m medv` is the `medv` command: what `torchrun -m medv` and `deepspeed --module medv` start."""

from medv.cli import main

if __name__ == "__main__":
    main()
