// The kvshrink command.
#include "program.h"

int main(int argc, char** argv) {
  kvshrink::cli::Program program;
  AddEncodeCommands(&program);
  AddEvalCommand(&program);
  AddCalibrateCommand(&program);
  AddInspectCommands(&program);
  AddPutCommand(&program);
  AddGetCommand(&program);
  AddAttendCommand(&program);
  AddChunkCommands(&program);
  AddInfoCommand(&program);
  return program.Run(argc, argv);
}
