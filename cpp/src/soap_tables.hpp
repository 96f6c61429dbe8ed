// Tables of SOAP, for another back end. Private to the core; views into the descriptor.
#pragma once

#include "soap_kernels.hpp"
#include "thalweg/soap.hpp"

namespace thalweg {

const SoapBasis& soap_basis(const Soap& soap);

}  // namespace thalweg
