import sys

from fedjax_llm.replay import main

sys.exit(main())
