import sys

from fedjax_llm.sweep import main

sys.exit(main())
